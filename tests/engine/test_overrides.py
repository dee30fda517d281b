import pytest
from detectron2.config import instantiate

from fiber_d2.engine.overrides import import_user_modules, load_config

CONFIG = """
from detectron2.config import LazyCall as L

def build(*, size, depth=2, **rest):
    return size, depth, rest

def strict(*, size, depth=2):
    return size, depth

train = dict(max_iter=10, amp=dict(enabled=False), output_dir="out")
loose = L(build)(size=1)
model = L(strict)(size=1)
data = dict(tests=[L(strict)(size=1), L(strict)(size=2)])
borrowed = dict(amp="${train.amp}")
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def test_known_keys_and_arguments_left_at_their_defaults(config):
    cfg = load_config(
        config,
        [
            "train.max_iter=3",
            "train.amp.enabled=true",
            "model.depth=7",
            "data.tests.1.depth=5",
            "loose.anything=1",
            "+train.extra=x",
        ],
    )
    assert cfg.train.max_iter == 3
    assert cfg.train.amp.enabled is True
    assert cfg.train.extra == "x"
    assert instantiate(cfg.model) == (1, 7)
    assert instantiate(cfg.data.tests[1]) == (2, 5)
    assert instantiate(cfg.loose) == (1, 2, {"anything": 1})


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.max_itr=3", "did you mean train.max_iter?"),
        ("max_iter=3", "did you mean train.max_iter?"),
        ("model.dept=3", "did you mean model.depth?"),
        ("data.tests.0.dept=3", "did you mean data.tests.0.depth"),
        ("data.tests.2.depth=3", "data.tests.1.depth"),
        ("model.size.x=3", "did you mean model.size?"),
        ("borrowed.amp.enable=1", "did you mean train.amp.enabled?"),
        ("zzz=3", "no known key is close"),
    ],
)
def test_an_unknown_key_is_named_with_the_closest_ones(config, override, hint):
    with pytest.raises(KeyError) as caught:
        load_config(config, [override])
    message = caught.value.args[0]
    assert repr(override.split("=")[0]) in message
    assert hint in message


def test_the_output_folder_is_known_before_an_override_fails(config):
    for overrides, expected in ((["x=1"], "out"), (["x=1", "train.output_dir=b"], "b")):
        seen = []
        with pytest.raises(KeyError):
            load_config(config, overrides, seen.append)
        assert seen == [expected]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.size=["], r"'model\.size=\[' cannot be read"),
        (["~train.amp"], "cannot delete"),
        (["train.max_iter=3", "--resume"], "--resume comes after"),
    ],
)
def test_overrides_that_cannot_be_read(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config, overrides)


def test_configuration_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.py does not exist"):
        load_config(str(tmp_path / "nope.py"), [])
    with pytest.raises(ValueError, match="--config-file is missing"):
        load_config("", [])
    for name, text in (("a.py", "train = dict("), ("b.py", "import no_such_module"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_config(str(tmp_path / name), [])


YAML = """
MODEL:
  META_ARCHITECTURE: "FIBER"
SOLVER:
  BASE_LR: 0.5
VERSION: 2
"""


def test_yaml_with_both_kinds_of_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    overrides = ["SOLVER.MAX_ITER=7", "OUTPUT_DIR", "a=b", "DATASETS.TEST=('x', 'y')"]
    seen = []
    cfg = load_config(str(path), overrides, seen.append)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 7)
    assert cfg.OUTPUT_DIR == "a=b"
    assert seen == ["a=b"]
    assert cfg.DATASETS.TEST == ("x", "y")
    with pytest.raises(KeyError, match=r"SOLVER\.BASE_L'.*SOLVER\.BASE_LR"):
        load_config(str(path), ["SOLVER.BASE_L=1"])
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR has no value"):
        load_config(str(path), ["SOLVER.BASE_LR"])
    path.write_text(YAML.replace("BASE_LR", "BASE_RL"))
    with pytest.raises(KeyError, match=r"SOLVER\.BASE_RL'.*SOLVER\.BASE_LR"):
        load_config(str(path), [])


def test_yaml_cannot_run_code(tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "config.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{made}"]\n')
    with pytest.raises(ValueError, match="not a Detectron2 yaml"):
        load_config(str(path), [])
    assert not made.exists()


def test_user_modules(tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog

    path = tmp_path / "mine.py"
    path.write_text(
        "from detectron2.data import DatasetCatalog\n"
        "DatasetCatalog.register('test_overrides_set', lambda: [])\n"
    )
    import_user_modules([str(path)])
    assert "test_overrides_set" in DatasetCatalog.list()
    DatasetCatalog.remove("test_overrides_set")
    with pytest.raises(FileNotFoundError, match="not_there"):
        import_user_modules([str(tmp_path / "not_there.py")])
    with pytest.raises(ValueError, match="no_such_module_x"):
        import_user_modules(["no_such_module_x"])
