"""The tools' flags and files. Their numbers are tested in test_quality.py."""

from pathlib import Path

import benchmark
import plot
import pytest
import quality

LOG = "step,time,loss_D,d_real\n5,1.5,0.7,0.2\n10,2.5,0.6,0.3\n"


def test_plot_reads_a_log_that_is_being_written_or_was_edited():
    Path("run").mkdir()
    expected = {"step": [5, 10], "time": [1.5, 2.5], "loss_D": [0.7, 0.6], "d_real": [0.2, 0.3]}
    for rest in ("", "15", "15,3.5,0.5\n", "15,3.5,0.5,0.4", "a note\n", "\n", "\0\0\0"):
        Path("run/log.csv").write_text(LOG + rest)
        assert plot.read_log("run") == expected
    Path("run/log.csv").write_text(LOG.splitlines()[0] + "\n5,1.")
    with pytest.raises(SystemExit, match="has no rows yet"):
        plot.read_log("run")


def test_plot_writes_into_the_first_run():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    for run in ("run", "other"):
        Path(run).mkdir()
        Path(run, "log.csv").write_text(LOG)
    for _ in range(2):
        plot.main(["run", "other"])
    assert Path("run/losses.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "main, argv, message",
    [
        (
            benchmark.main,
            "--rounds -1",
            "argument --rounds: must be a whole number, 1 or more, not -1",
        ),
        (benchmark.main, "--device gpu", "argument --device: gpu is not a device that PyTorch"),
        (quality.main, "mnist x --classifier-steps 0", "argument --classifier-steps: must be a"),
        (plot.main, "", "the following arguments are required: RUN"),
    ],
)
def test_a_wrong_flag_is_one_line(main, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and message in line and line.count("\n") == 1
