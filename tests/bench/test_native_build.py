"""Whether prebuilt libraries are from the sources beside them."""

import json

from tensorcomp_ext._native_build import RECORD, add_record, read_record, sources_hash, state


def test_changed_sources_make_libraries_stale(tmp_path):
    csrc, package = tmp_path / "csrc", tmp_path / "package"
    (csrc / "tests").mkdir(parents=True)
    package.mkdir()
    (csrc / "a.cu").write_text("one")
    assert state(package, csrc) == (False, "no libraries here")
    for name in ("_ops.so", "_ops_cuda.so"):
        (package / name).touch()
        add_record(package / name, sources=sources_hash(csrc), archs="9.0a")
    fresh, text = state(package, csrc)
    assert fresh and "_ops_cuda.so from " in text and "for 9.0a" in text
    (csrc / "tests" / "t.cpp").write_text("no part of the libraries")
    assert state(package, csrc)[0]
    (csrc / "a.cu").write_text("two")
    assert not state(package, csrc)[0] and state(package, csrc)[1].startswith("STALE")
    add_record(package / "_ops.so", sources=sources_hash(csrc))
    assert not state(package, csrc)[0]  # the other one is of old sources still
    assert set(read_record(package)) == {"_ops.so", "_ops_cuda.so"}


def test_libraries_without_a_record_are_stale(tmp_path):
    (tmp_path / "_ops.so").touch()
    (tmp_path / RECORD).write_text("{")
    assert read_record(tmp_path) == {} and not state(tmp_path, tmp_path)[0]
    (tmp_path / RECORD).write_text(json.dumps([]))
    assert read_record(tmp_path) == {}
