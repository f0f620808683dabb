"""The tests are tested: what keeps a fault from happening, how to take it away, and the test that must then fail."""

from typing import NamedTuple


class Guard(NamedTuple):
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # file::name, fails once `new` stands in place of `old`


FAULTS, ZOO = (
    "test_faults.py::test_",
    "test_faults.py::test_a_folder_gets_its_exit_status_one_line_and_is_left_as_it_is",
)
DAMAGED = f"{FAULTS}a_damaged"
STEPS = f"{FAULTS}a_file_is_on_disk_before_it_takes_its_name_and_dead_leftovers_go"

GUARDS = [
    Guard(
        "a new file takes the old one's place in one step",
        "common.py",
        "os.replace(temporary, path)",
        "shutil.copyfile(temporary, path)",
        STEPS,
    ),
    Guard("fsync before the rename", "common.py", "os.fsync(file.fileno())", "pass", STEPS),
    Guard("fsync of the folder", "common.py", "        sync(path.parent)", "        pass", STEPS),
    Guard(
        "what a killed run left is deleted", "common.py", "                old.unlink()", "                pass", STEPS
    ),
    Guard(
        "space is asked for before the work",
        "common.py",
        ".free) < size:",
        ".free) < 0:",
        f"{FAULTS}a_full_disk_is_told_before_the_work_with_path_and_bytes",
    ),
    Guard(
        "outputs are tried before the work",
        "train.py",
        "    common.require_writable(",
        "    print(",
        f"{FAULTS}an_output_that_cannot_be_written_is_told_before_the_work[train]",
    ),
    Guard(
        "CRC of a checkpoint",
        "common.py",
        "if broken := archive.testzip():",
        "if broken := None:",
        f"{DAMAGED}_checkpoint_is_refused_or_harmless",
    ),
    Guard(
        "weights only", "common.py", "weights_only=True", "weights_only=False", f"{FAULTS}no_checkpoint_is_ever_code"
    ),
    Guard(
        "finite weights",
        "common.py",
        "not value.float().isfinite().all()",
        "False",
        f"{FAULTS}an_absurd_checkpoint_is_one_line_and_2",
    ),
    Guard(
        "variances of at least 0",
        "common.py",
        "negative = ",
        "negative = False and ",
        f"{FAULTS}an_absurd_checkpoint_is_one_line_and_2",
    ),
    Guard(
        "no archive grows",
        "common.py",
        "archive.infolist()) > size:",
        "archive.infolist()) > 1e18:",
        f"{FAULTS}an_absurd_checkpoint_is_one_line_and_2",
    ),
    Guard(
        "hash of the cached ImageNet weights",
        "train.py",
        ".startswith(expected)",
        '.startswith("")',
        f"{FAULTS}a_cached_weights_file_that_is_not_the_published_one_is_refused_by_name",
    ),
    Guard(
        "a stalled server is left",
        "train.py",
        "socket.setdefaulttimeout(12)",
        "socket.setdefaulttimeout(1000)",
        f"{FAULTS}a_download_that_fails_names_the_address_the_file_and_the_flag",
    ),
    Guard(
        "checksum of a record",
        "common.py",
        "stored != checksum(content)",
        "False",
        f"{DAMAGED}_model_json_is_refused_or_harmless",
    ),
    Guard(
        "hash of a predictions.csv",
        "evaluate.py",
        'report.get("predictions_sha256", common.hash_file(path)) != ',
        "False and ",
        f"{DAMAGED}_predictions_csv_is_refused_or_harmless",
    ),
    Guard(
        "CRC of a feature",
        "common.py",
        " - 4]) != crc:",
        " - 4]) is None:",
        f"{DAMAGED}_feature_store_is_computed_again_bit_for_bit",
    ),
    Guard(
        "hash of every image",
        "common.py",
        ".get(file, digest) != digest:",
        ".get(file, digest) is None:",
        f"{FAULTS}every_changed_byte_of_a_recorded_image_is_refused_with_its_path",
    ),
    Guard(
        "only two classes", "common.py", "        if name not in CLASSES:", "        if False:", f"{ZOO}[a third class]"
    ),
    Guard(
        "no linked classes",
        "common.py",
        "if root.is_symlink() or folder.is_symlink():",
        "if False:",
        f"{ZOO}[one class linked to the other]",
    ),
    Guard("no hidden images", "common.py", 'if name[0] != "." and ', "if ", f"{ZOO}[junk in every folder]"),
    Guard(
        "no image of two classes",
        "common.py",
        "if digest and twin.parent != path.parent",
        "if False",
        f"{ZOO}[the same image in both classes]",
    ),
    Guard("no bombs", "common.py", "if image.width * image.height > MAX_PIXELS:", "if False:", f"{ZOO}[a bomb]"),
    Guard("no threads", "common.py", "if max(image.size) > 20 * min(image.size):", "if False:", f"{ZOO}[a thread]"),
    Guard("no pictures of two colours", "common.py", 'if image.mode == "1":', "if False:", f"{ZOO}[two colours]"),
    Guard(
        "unreadable images stop the run",
        "common.py",
        "    if lines and not skip:",
        "    if False:",
        f"{FAULTS}all_unreadable_images_are_reported_at_once_and_left_out_only_when_asked",
    ),
    Guard(
        "SIGTERM is answered",
        "common.py",
        "(signal.SIGINT, signal.SIGTERM)}",
        "(signal.SIGINT,)}",
        f"{FAULTS}a_second_signal_does_not_cut_the_orderly_end_short",
    ),
    Guard(
        "a second signal is ignored",
        "common.py",
        "if not stops or time.monotonic() > stops[-1][0] + 3:",
        "if True:",
        f"{FAULTS}a_second_signal_does_not_cut_the_orderly_end_short",
    ),
    Guard(
        "an interrupt stays one",
        "common.py",
        "if stops and not isinstance(error, Failure | KeyboardInterrupt):",
        "if False:",
        f"{FAULTS}an_interrupt_that_a_library_swallows_can_be_repeated_and_is_one_line",
    ),
    Guard(
        "a swallowed interrupt comes back",
        "common.py",
        "    if stops:\n",
        "    if False:\n",
        f"{FAULTS}an_interrupt_that_a_library_swallows_can_be_repeated_and_is_one_line",
    ),
    Guard(
        "no process outlives a killed script",
        "common.py",
        "while os.getppid() == parent and multiprocessing.parent_process().is_alive():",
        "while True:",
        f"{FAULTS}a_killed_script_leaves_no_decoding_process",
    ),
    Guard(
        "a hung worker is given up",
        "common.py",
        "signal.alarm(PATIENCE if",
        "signal.alarm(0 if",
        f"{FAULTS}a_decoding_process_that_dies_or_hangs_is_a_message",
    ),
    Guard(
        "memory names the flag",
        "common.py",
        '"out of memory" in text',
        "False",
        f"{FAULTS}a_full_memory_names_the_flag_that_helps",
    ),
    Guard(
        "BatchNorm is frozen",
        "common.py",
        "network.float().eval()",
        "network.float().train()",
        "test_train.py::test_no_tensor_of_the_backbone_changes",
    ),
    Guard(
        "a loss that is not finite stops the training",
        "train.py",
        "if not all(map(math.isfinite, row)):",
        "if False:",
        "test_train.py::test_a_loss_that_is_not_finite_stops_with_3_and_saves_nothing",
    ),
    Guard(
        "probabilities, not logits",
        "evaluate.py",
        " + model.bias).sigmoid()",
        " + model.bias)",
        "test_evaluate.py::test_logits_between_0_and_1_are_not_taken_for_probabilities",
    ),
    Guard(
        "both classes to score",
        "evaluate.py",
        "        if label not in labels:",
        "        if False:",
        "test_evaluate.py::test_one_class_alone_is_refused",
    ),
    Guard(
        "one split at a time",
        "split_val.py",
        "fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_split_val.py::test_four_at_once_split_once",
    ),
]
