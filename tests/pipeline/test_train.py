"""The last line that the train stage prints. tests/system runs the stage itself."""

from pipeline.train import end_line


def test_end_line_distinguishes_training_from_what_was_trained_before():
    files = "models/final/weights.safetensors"
    assert end_line(13.4, 60, trained_before=False) == f"done in 13 s: trained to step 60, {files}"
    assert end_line(13.4, 60, trained_before=True) == f"done in 13 s, without training: {files} is from step 60"
