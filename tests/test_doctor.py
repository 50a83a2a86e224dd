import socket
import time
from importlib import metadata

from rich.console import Console

from terrasynth.doctor import EXTRAS, check_hub, check_package, checks, run


def test_nothing_that_is_needed_is_missing_here():
    found = {check.name: check for check in checks()}
    assert {name for name, check in found.items() if check.status == "FAILED"} == set()
    assert {"Python", "torch", "pillow", "segmentation-models-pytorch", "speed, CPU", "GPU", "hub"} <= {
        "GPU" if name.startswith("GPU") else name for name in found
    }


def test_the_table_is_printed_whole_and_says_that_all_is_well():
    console = Console(record=True, width=200)
    assert run(console)
    text = console.export_text()
    assert "Everything that is needed works." in text
    assert metadata.version("torch") in text


def test_a_missing_package_comes_with_the_command_that_installs_it():
    check = check_package("no-such-package-anywhere", "1.2")
    assert (check.status, check.detail) == (
        "FAILED",
        "not installed; pip install --upgrade 'no-such-package-anywhere>=1.2'",
    )


def test_an_old_package_is_a_failure_and_versions_compare_as_numbers():
    assert check_package("pyyaml", "999.0").status == "FAILED"
    assert check_package("torch", "2.6").status == "ok"
    assert check_package("rich", metadata.version("rich")).status == "ok"


def test_a_package_that_does_not_import_is_a_failure(tmp_path, monkeypatch):
    (tmp_path / "broken_thing.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    info = tmp_path / "broken_thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-thing\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = check_package("broken-thing", "1.0")
    assert check.status == "FAILED"
    assert "OSError: libcuda.so.1" in check.detail


def test_every_extra_for_users_is_explained():
    extras = set(metadata.metadata("terrasynth").get_all("Provides-Extra"))
    assert set(EXTRAS) == extras - {"test", "docs"}


def test_a_hub_that_never_answers_costs_no_more_than_the_timeout(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.perf_counter()
        check = check_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    assert check.status == "note"
    assert time.perf_counter() - begun < 1


def test_offline_by_choice_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in check_hub("http://127.0.0.1:1").detail
