import os
import tempfile

from hdpo_jax.tools.kernel.output import Output


def test_head_and_tail_are_kept_and_the_middle_is_counted():
    with tempfile.TemporaryFile() as file:
        output = Output(10, file.fileno())
        for piece in ("abc", "defgh", "ij", "0123456789" * 3, "vwxyz"):
            output.write(piece)
        assert output.take() == "abcde\n[… 35 characters cut …]\nvwxyz"
        assert output.take() == ""


def test_text_within_the_limit_is_whole():
    with tempfile.TemporaryFile() as file:
        output = Output(10, file.fileno())
        output.write("0123456789")
        assert output.take() == "0123456789"


def test_many_small_writes_stay_bounded():
    with tempfile.TemporaryFile() as file:
        output = Output(100, file.fileno())
        for _ in range(50_000):
            output.write("x")
        text = output.take()
        assert text == "x" * 50 + "\n[… 49900 characters cut …]\n" + "x" * 50


def test_what_other_processes_write_keeps_its_place():
    with tempfile.TemporaryFile(buffering=0) as file:
        os.set_blocking(file.fileno(), True)
        output = Output(100, file.fileno())
        output.write("a")
        file.seek(0, os.SEEK_END)
        file.write(b"b")
        output.write("c")
        output.buffer.write("d€".encode())
        assert output.take() == "abcd€"


def test_a_flood_from_other_processes_is_read_at_its_ends_only():
    with tempfile.TemporaryFile(buffering=0) as file:
        output = Output(10, file.fileno())
        file.write(b"start" + b"." * 1_000_000 + b"final")
        text = output.take()
        assert text.startswith("start\n") and text.endswith("\nfinal")
        assert "1000000 characters cut" in text
