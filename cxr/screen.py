"""What evaluate.py prints: the report of a split, and the predictions of new images."""

from cxr import source_sentences
from cxr.errors import warn
from cxr.predictions import predicted_classes
from cxr.proportions import format_interval
from cxr.sentences import number_label, sections, summary_rows, warnings_of


def print_report(report, predictions):
    """Prints the report. The first two lines keep their form, so that runs can be compared.

    predictions: the table, for the names of the images.
    """
    split = report["split"].capitalize()
    print(f"{split} accuracy: {report['metrics']['accuracy']['value']:.3f}")
    print(f"{split} F1-score: {report['metrics']['f1']['value']:.3f}\n")
    for name, text in summary_rows(report):
        print(f"{name:11} {text}")
    print_scores(report)
    for title, lines in sections(report, name_label(predictions)):
        separator = " " if len(lines) == 1 else "\n  "
        print(separator.join([f"{title}:", *lines]))
    if report.get("also"):
        print_sources(report)


def print_warnings(report, predictions):
    """Prints the warnings of a report on stderr."""
    for text in warnings_of(report, name_label(predictions)):
        warn(text)


def name_label(predictions):
    """Returns a function that shows the number of an image with its file name."""
    names = dict(zip(predictions["number"], predictions["file"], strict=True))

    def label(number):
        # An earlier table may have had other numbers.
        return (
            f"{number_label(number)} ({names[number]})" if number in names else number_label(number)
        )

    return label


def print_scores(report):
    """Prints each score with its interval, the subgroups, and the confusion matrix."""
    print(f"\n{'':18} {'value':>9}   95 % interval")
    for name, metric in report["metrics"].items():
        value, _, interval = format_interval(metric).partition(" ")
        print(f"{name:18} {value:>9}   {interval.strip('()')}".rstrip())
    for subgroup in report["subgroups"].values():
        name = f"{subgroup['metric']}, {subgroup['group']}"
        print(f"  {name:36} {format_interval(subgroup)}, n = {subgroup['n']}")
    counts = report["counts"]
    negative, positive = report["classes"]
    width = max(len(negative), len(positive)) + 13  # of a column: "predicted NAME" and a gap
    print(f"\n{'':{width}}{f'predicted {negative}':>{width}}{f'predicted {positive}':>{width}}")
    print(f"{f'true {negative}':{width}}{counts['tn']:>{width}}{counts['fp']:>{width}}")
    print(f"{f'true {positive}':{width}}{counts['fn']:>{width}}{counts['tp']:>{width}}\n")


def print_sources(report):
    """Prints the sources side by side, and how much local images would help."""
    sources, (_, positive) = report["also"], report["classes"]
    print("Sources, with the same model and threshold:")
    for source in sources:
        print(f"  {source['name']}: {source['data']}")
    print_table(sources, positive)
    headlines = [source_sentences.headline(source, sources[0]) for source in sources[1:]]
    for line in source_sentences.notes(sources) + headlines:
        print(f"  {line}")
    print(f"{source_sentences.LOCAL_TITLE}:\n  {source_sentences.LOCAL_METHOD}")
    for source in sources[1:]:
        if source["local_data"]:
            header = source["name"], "accuracy", "Brier score"
            for row in [header, *source_sentences.local_rows(source["local_data"])]:
                print("  {:24} {:24} {}".format(*row))
        for line in source_sentences.local_notes(source):
            print(f"  {line}")


def print_table(sources, positive):
    """Prints a column for each source, and below each score the differences to the first one."""
    width = max(26, *(len(source["name"]) for source in sources))

    def print_row(label, texts):
        print(f"  {label:31} ", "  ".join(f"{text:{width}}" for text in texts).rstrip())

    print_row("", [source["name"] for source in sources])
    for label, cells in source_sentences.table_rows(sources, positive):
        print_row(label, [text for _, text, _ in cells])
        differences = [difference for _, _, difference in cells]
        if any(differences):
            print_row("  difference", differences)


def print_predictions(predictions, threshold, classes):
    """Prints probability and predicted class of each image."""
    digits = max(len("no."), len(str(len(predictions))))
    width = max(len(file) for file in predictions["file"])
    header = f"P({classes[1]})"
    print(f"{'no.':>{digits}}  {'file':{width}}  {header}  prediction")
    predicted = predicted_classes(predictions, threshold, classes)
    for row, name in zip(predictions.itertuples(), predicted, strict=True):
        prob = "-" if row.error else f"{row.probability:.3f}"
        novelty = ""
        if row.unlike > 1:
            novelty = f", unlike the training images (novelty {row.unlike:.2g}, usually below 1)"
        image = f"{row.number:{digits}}  {row.file:{width}}"
        print(f"{image}  {prob:>{len(header)}}  {row.error or name}{novelty}")
