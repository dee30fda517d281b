"""The Detectron2 installer, without network: edits, hash, unpacking, and what it leaves alone."""

import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # typing.NamedTuple looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_archive(path: Path, entries: dict, *, link: str = "") -> Path:
    """A .tar.gz of text files, plus a symbolic link of that name to /etc when one is asked for."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(member)
    return path


def test_edits_change_what_they_name(installer, tmp_path):
    (tmp_path / "a.py").write_text("x = np.int\ny = np.float\n")
    edits = (installer.Edit("a.py", "np.int", "int"), installer.Edit("a.py", "np.float", "float"))
    installer.apply_edits(tmp_path, edits)
    assert (tmp_path / "a.py").read_text() == "x = int\ny = float\n"


@pytest.mark.parametrize("text, count", [("nothing here\n", 0), ("np.int\nnp.int\n", 2)])
def test_edit_that_does_not_match_exactly_once_stops_before_any_change(
    installer, tmp_path, text, count
):
    (tmp_path / "a.py").write_text("fine\n")
    (tmp_path / "b.py").write_text(text)
    edits = (installer.Edit("a.py", "fine", "changed"), installer.Edit("b.py", "np.int", "int"))
    with pytest.raises(installer.InstallError, match=rf"edit 2 of 2 \(b\.py.*occurs {count} times"):
        installer.apply_edits(tmp_path, edits)
    assert (tmp_path / "a.py").read_text() == "fine\n"
    assert (tmp_path / "b.py").read_text() == text


def test_edit_of_a_missing_file_names_it(installer, tmp_path):
    with pytest.raises(installer.InstallError, match=r"gone\.py.*no such file"):
        installer.apply_edits(tmp_path, (installer.Edit("gone.py", "a", "b"),))


def test_listed_edits_do_not_feed_each_other(installer):
    """New text that contains the old text of the same file would match on the wrong place."""
    for edit in installer.EDITS:
        others = [e for e in installer.EDITS if e.file == edit.file and e is not edit]
        assert not any(other.old in edit.new for other in others), edit
        assert edit.old != edit.new


def test_hash_mismatch_is_refused(installer, tmp_path):
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(b"not what was pinned")
    with pytest.raises(
        installer.InstallError, match="sha256 .* expected " + installer.SDIST_SHA256
    ):
        installer.check_hash(sdist)
    # echo -n | sha256sum
    sdist.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    installer.check_hash(sdist, empty)


def test_unpack_returns_the_top_folder(installer, tmp_path):
    sdist = write_archive(tmp_path / "s.tar.gz", {"top/setup.py": "1\n", "top/pkg/a.py": "2\n"})
    tree = installer.unpack(sdist, tmp_path / "out")
    assert tree == tmp_path.resolve() / "out" / "top"
    assert (tree / "pkg" / "a.py").read_text() == "2\n"


@pytest.mark.parametrize("name", ["../evil.py", "top/../../evil.py", "/evil-absolute.py"])
def test_unpack_refuses_to_leave_its_folder(installer, tmp_path, name):
    sdist = write_archive(tmp_path / "s.tar.gz", {"top/a.py": "1\n", name: "2\n"})
    with pytest.raises(installer.InstallError, match="unsafe entry"):
        installer.unpack(sdist, tmp_path / "out")
    assert not (tmp_path / "evil.py").exists()


def test_unpack_refuses_links(installer, tmp_path):
    sdist = write_archive(tmp_path / "s.tar.gz", {"top/a.py": "1\n"}, link="top/link")
    with pytest.raises(installer.InstallError, match="unsafe entry 'top/link'"):
        installer.unpack(sdist, tmp_path / "out")


def forbid_install(installer, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be installed")

    monkeypatch.setattr(installer, "pip", refuse)


@pytest.mark.parametrize("arguments", [[], ["--official", "somewhere"]])
def test_importable_detectron2_is_left_alone(installer, monkeypatch, capsys, arguments):
    forbid_install(installer, monkeypatch)
    assert installer.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Detectron2 0.6 (" in out and "left as it is" in out


def test_broken_detectron2_is_reported_not_replaced(installer, monkeypatch, capsys):
    forbid_install(installer, monkeypatch)
    monkeypatch.setattr(installer, "find_installed", lambda: (None, "ImportError: no _C"))
    assert installer.main([]) == 1
    assert "ImportError: no _C" in capsys.readouterr().err


def test_missing_and_wrong_sdist_exit_with_one_line(installer, monkeypatch, capsys, tmp_path):
    forbid_install(installer, monkeypatch)
    monkeypatch.setattr(installer, "find_installed", lambda: (None, None))
    assert installer.main(["--sdist", str(tmp_path / "gone.tar.gz")]) == 1
    wrong = write_archive(tmp_path / "wrong.tar.gz", {"top/setup.py": ""})
    assert installer.main(["--sdist", str(wrong)]) == 1
    missing, mismatch = capsys.readouterr().err.splitlines()
    assert "there is no file" in missing and "sha256" in mismatch


def test_stub_extension_answers_or_explains(installer, tmp_path):
    (tmp_path / "detectron2").mkdir()
    installer.write_stub(tmp_path)
    spec = importlib.util.spec_from_file_location("_C", tmp_path / installer.STUB_FILE)
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    assert stub.has_cuda() is False
    assert isinstance(stub.get_compiler_version(), str)
    assert isinstance(stub.get_cuda_version(), str)
    with pytest.raises(ImportError, match="'deform_conv_forward' is compiled code"):
        stub.deform_conv_forward  # noqa: B018
    assert not hasattr(stub, "__wrapped__")
    with pytest.raises(installer.InstallError, match="in the source distribution already"):
        installer.write_stub(tmp_path)
