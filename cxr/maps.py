"""Class activation maps: which regions of an image raise or lower the network's score."""

import copy

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import nn

from cxr.errors import Failure
from cxr.files import atomic_write
from cxr.folders import COLOURS
from cxr.proportions import format_probability

BATCH = 16  # images


def legend(classes):
    """Returns a line that explains the colours of the maps."""
    negative, positive = classes
    return f"orange: evidence for {positive}; blue: evidence for {negative}"


def class_maps(model, pixels):
    """Computes class activation maps, float32 (N, h, w), or None if the network has none.

    A map is positive where the image speaks for the positive class. Source: Zhou et al. 2016.
    pixels: uint8 (N, 1, SIZE, SIZE).
    """
    feature_map = last_feature_map(model, pixels)
    if feature_map is None:
        return None
    # The mean of this map over all positions is the logit, because pooling is linear.
    return torch.einsum("nchw,c->nhw", feature_map, model.head.weight[0]) + model.head.bias


def last_feature_map(model, pixels):
    """Returns the feature map before global average pooling, float32 (N, width, h, w), or None."""
    network = copy.deepcopy(model.backbone.network).to(model.device)
    width = model.backbone.width
    outputs = []

    def keep_output(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] == width:
            outputs.append(output)

    hooks = [module.register_forward_hook(keep_output) for module in network.modules()]
    with torch.inference_mode():
        features = network(model.backbone.normalize(pixels.to(model.device)))
    for hook in hooks:
        hook.remove()
    # The feature map is the last output whose mean over the positions equals the features. The
    # outputs are compared after the pass: the last ReLU of a DenseNet changes its input in place.
    tolerance = 1e-4 * features.abs().max().item()
    for output in reversed(outputs):
        has_positions = output[0, 0].numel() > 1
        if has_positions and torch.allclose(output.mean((2, 3)), features, 1e-3, tolerance):
            return output.cpu()
    return None


def overlay(view, class_map):
    """Draws a class activation map over its image. Returns uint8 (SIZE, SIZE, 3).

    view: uint8 (1, SIZE, SIZE); class_map: float32 (h, w). Orange is positive, blue is negative.
    """
    from matplotlib.colors import to_rgb

    grey = view[0, :, :, None].float()
    heat = nn.functional.interpolate(class_map[None, None], grey.shape[:2], mode="bilinear")
    heat = heat[0, 0, :, :, None]  # shaped like grey
    blue, orange = (torch.tensor(to_rgb(colour)) * 255 for colour in COLOURS)
    opacity = 0.7 * heat.abs() / heat.abs().max().clamp(min=1e-12)
    picture = grey * (1 - opacity) + torch.where(heat > 0, orange, blue) * opacity
    return picture.round().byte().numpy()


def read_overlays(model, views, rows):
    """Yields (image uint8 (SIZE, SIZE), its overlay uint8 (SIZE, SIZE, 3) or None) for each row.

    views: common.Views of the images; rows: list of row numbers.
    """
    # In batches, so that any number of images fits into the memory.
    for start in range(0, len(rows), BATCH):
        items = [views[row] for row in rows[start : start + BATCH]]
        for row, _, reason in items:
            if reason:
                raise Failure(
                    f"{views.xrays[row].path}: {reason}; run evaluate.py (make evaluate) again"
                )
        pixels = torch.cat([item_views for _, item_views, _ in items])
        maps = class_maps(model, pixels)
        for i, view in enumerate(pixels):
            picture = None if maps is None else overlay(view, maps[i])
            yield view[0].numpy(), picture


def write_overlays(folder, model, views, predictions, on_image=None):
    """Writes map_17.png for image no. 17 into `folder`, or into its class folder if it has a label.

    Maps of an earlier run are removed, because there the numbers may be those of other images.
    views: common.Views of the images in `predictions`; on_image: function that is called with
    (Xray, image uint8 (SIZE, SIZE), overlay uint8 (SIZE, SIZE, 3)) for each of them.
    """
    classes = model.info["classes"]
    font = PIL.ImageFont.load_default(14)
    written = set()
    overlays = read_overlays(model, views, list(range(len(views))))
    for xray, row, (view, picture) in zip(
        views.xrays, predictions.itertuples(), overlays, strict=True
    ):
        title = f"no. {row.number}: P({classes[1]}) {format_probability(row.probability)}"
        subfolder = folder
        if xray.label is not None:
            title += f", label {classes[xray.label]}"
            subfolder = folder / classes[xray.label]
        path = subfolder / f"map_{row.number}.png"
        written.add(path)
        sheet = PIL.Image.new("RGB", (448, 488), "white")
        sheet.paste(PIL.Image.fromarray(picture).resize((448, 448)), (0, 40))
        PIL.ImageDraw.Draw(sheet).text((4, 2), f"{title}\n{legend(classes)}", "black", font)
        with atomic_write(path) as file:
            sheet.save(file, format="png")
        if on_image:
            on_image(xray, view, picture)
    for subfolder in (folder, *(folder / name for name in classes)):
        for path in set(subfolder.glob("map_[0-9]*.png")) - written:
            path.unlink()
    print(f"Wrote class activation maps of {len(views)} images to {folder}")
