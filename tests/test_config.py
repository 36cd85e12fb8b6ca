from pathlib import Path

import pydantic
import pytest
import tensorflow_hub

from data.errors import InputError
from models.backbones import BACKBONES
from pipeline.config import PRESETS, Config, load_config
from pipeline.vertex import require_name
from preprocessing.images import InputSpec


def _load(*, toml: str | None = None, overrides=(), environment=None, folder: Path | None = None) -> Config:
    path = None
    if toml is not None:
        path = folder / "settings.toml"
        path.write_text(toml, encoding="utf-8")
    return load_config(path and str(path), overrides=overrides, environment=environment or {})


def _error(**sources) -> str:
    with pytest.raises(InputError) as caught:
        _load(**sources)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load_config_without_settings_is_the_default_preset():
    assert _load() == Config()
    assert _load().preset == "default"


@pytest.mark.parametrize("preset", PRESETS)
def test_load_config_takes_every_setting_of_a_preset(preset):
    config = _load(overrides=[f"preset={preset}"])

    assert config.preset == preset
    for section, settings in PRESETS[preset].items():
        for name, value in settings.items():
            assert getattr(getattr(config, section), name) == value


def test_presets_are_those_that_the_setting_offers():
    for preset in PRESETS:
        assert Config(preset=preset).preset == preset
    assert {"smoke", "default", "accurate"} <= set(PRESETS)


def test_preset_smoke_asks_for_less_than_the_default():
    smoke, default = _load(overrides=["preset=smoke"]), _load()

    assert smoke.input_spec.image_size < default.input_spec.image_size
    assert smoke.training.epochs < default.training.epochs
    assert smoke.evaluation.min_accuracy < default.evaluation.min_accuracy


def test_load_config_reads_a_toml_file(tmp_path):
    toml = """
    preset = "smoke"

    [data]
    input = "fotos/ü"
    slice_columns = ["camera"]

    [training]
    epochs = 7
    """

    config = _load(toml=toml, folder=tmp_path)

    assert config.data.input == "fotos/ü"
    assert config.data.slice_columns == ("camera",)
    assert config.training.epochs == 7
    assert config.training.batch_size == PRESETS["smoke"]["training"]["batch_size"]


def test_load_config_lets_the_later_source_win(tmp_path):
    toml = '[training]\nepochs = 2\npatience = 2\nseed = 2\n[preprocessing]\nimage_size = 96\n[data]\ninput = "a"\n'
    environment = {"TFX_VISION_TRAINING__PATIENCE": "3", "TFX_VISION_TRAINING__SEED": "3"}

    config = _load(toml=toml, folder=tmp_path, environment=environment, overrides=["preset=smoke", "training.seed=4"])

    assert config.training.batch_size == PRESETS["smoke"]["training"]["batch_size"]
    assert config.preprocessing.image_size == 96
    assert (config.training.epochs, config.training.patience, config.training.seed) == (2, 3, 4)


def test_load_config_lets_the_last_of_two_overrides_win():
    assert _load(overrides=["training.epochs=2", "training.epochs=3"]).training.epochs == 3


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.input=gs://bucket/photos", "gs://bucket/photos"),
        ("data.input=C:\\photos", "C:\\photos"),
        ('data.input="2024"', "2024"),
        ("data.input= photos and more ", "photos and more"),
        ("data.split_salt=a=b", "a=b"),
        ("data.valid_fraction=0.25", 0.25),
        ("pipeline.cache=false", False),
        ('data.slice_columns=["a", "b"]', ("a", "b")),
        ("data.slice_columns=[]", ()),
    ],
)
def test_load_config_reads_values_as_toml_and_the_rest_as_text(override, value):
    section, name = override.partition("=")[0].split(".")

    assert getattr(getattr(_load(overrides=[override]), section), name) == value


def test_load_config_reads_the_environment_and_nothing_else_of_it():
    environment = {
        "TFX_VISION_DATA__INPUT": "gs://bucket/records",
        "TFX_VISION_VERTEX__ACCELERATOR_COUNT": "2",
        "TFX_VISION_CONFIG": "settings.toml",
        "TFX_VISION_DEBUG": "1",
        "HOME": "/home/me",
    }

    config = _load(environment=environment)

    assert config.data.input == "gs://bucket/records"
    assert config.vertex.accelerator_count == 2


def test_load_config_reads_the_process_s_own_environment(monkeypatch):
    monkeypatch.setenv("TFX_VISION_TRAINING__EPOCHS", "9")

    assert load_config().training.epochs == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "Received: `training.epoch`. Did you mean `training.epochs`? Known: training.epochs, "),
        ("trainig.epochs=3", "Received: `trainig`. Did you mean `training`? Known: preset, engine, pipeline, data, "),
        ("data.splt_salt=x", "Did you mean `data.split_salt`?"),
    ],
)
def test_load_config_names_the_nearest_known_setting(override, message):
    error = _error(overrides=[override])

    assert error.startswith("Expected a known setting in --set. ")
    assert message in error


def test_load_config_says_where_an_unknown_setting_is(tmp_path):
    path = tmp_path / "settings.toml"
    in_file = _error(toml="[model]\nbackbon = 1\n", folder=tmp_path)
    in_environment = _error(environment={"TFX_VISION_MODEL__BACKBON": "x"})

    assert in_file.startswith(f"Expected a known setting in {path}. Received: `model.backbon`. ")
    assert in_environment.startswith("Expected a known setting in the environment. Received: `model.backbon`. ")
    assert "Did you mean `model.backbone`?" in in_file
    assert "Did you mean `model.backbone`?" in in_environment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.epochs=0",
            "Expected `training.epochs` to be valid. Received: training.epochs=0. Input should be greater than or equal to 1.",
        ),
        (
            "training.epochs=many",
            "Expected `training.epochs` to be valid. Received: training.epochs='many'. "
            "Input should be a valid integer, unable to parse string as an integer.",
        ),
        (
            "model.backbone=resnet",
            "Expected `model.backbone` to be one of efficientnet_lite0, efficientnet_lite1, ",
        ),
        (
            "pipeline.name=My_Pipeline",
            "Expected `pipeline.name` to be valid. Received: pipeline.name='My_Pipeline'. String should match pattern",
        ),
        (
            "preprocessing.image_size=100",
            "Expected `image_size` to be a multiple of 32, the backbone's stride. Received: image_size=100. Use 96 or 128.",
        ),
        ("evaluation.min_accuracy=1.5", "Expected `evaluation.min_accuracy` to be valid. "),
        (
            "data.valid_fraction=0.95",
            "Expected `valid_fraction` + `test_fraction` to be below 1, as the rest is trained on. Received: ",
        ),
        (
            "vertex.accelerator_count=0",
            "Expected `vertex.accelerator_type` and `vertex.accelerator_count` both set or both empty. Received: ",
        ),
        ("preset=huge", "Expected `preset` to be one of smoke, default"),
        ("training=3", "Expected `training` in --set to be a section. Received: 3."),
        ("training.epochs", "Expected --set section.key=value. Received: 'training.epochs'."),
        ("a.b.c=1", "Expected --set section.key=value. Received: 'a.b.c=1'."),
        ("=1", "Expected --set section.key=value. Received: '=1'."),
    ],
)
def test_load_config_explains_a_wrong_value_in_one_line(override, message):
    assert _error(overrides=[override]).startswith(message)


@pytest.mark.parametrize("image_size", [225, 240])  # the latter is another backbone's own
def test_config_refuses_a_size_that_is_no_multiple_of_the_stride(image_size):
    error = _error(overrides=[f"preprocessing.image_size={image_size}"])

    assert error == (
        "Expected `image_size` to be a multiple of 32, the backbone's stride. "
        f"Received: image_size={image_size}. Use 224 or 256."
    )


@pytest.mark.parametrize("image_size", [32, 224, 1024])
def test_config_takes_multiples_of_the_stride(image_size):
    assert _load(overrides=[f"preprocessing.image_size={image_size}"]).input_spec.image_size == image_size


@pytest.mark.parametrize("name", BACKBONES)
def test_config_takes_the_backbone_s_own_size(name):
    default = _load(overrides=[f"model.backbone={name}"])
    size = default.input_spec.image_size

    assert _load(overrides=[f"model.backbone={name}", f"preprocessing.image_size={size}"]).input_spec == default.input_spec


HUB = "model.backbone=https://tfhub.dev/google/imagenet/inception_v3/feature_vector/5"


def test_config_of_a_hub_model_that_says_all_of_the_input_loads_nothing(monkeypatch):
    def fail(handle):
        raise AssertionError(handle)

    monkeypatch.setattr(tensorflow_hub, "resolve", fail)
    config = _load(overrides=[HUB, "preprocessing.image_size=299", "preprocessing.interpolation=bilinear"])

    assert config.input_spec == InputSpec(image_size=299, interpolation="bilinear")
    with pytest.raises(AssertionError, match="inception_v3"):
        _ = _load(overrides=[HUB, "preprocessing.image_size=299"]).input_spec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.weights=random", "model.weights_file=a.h5"],
            "Expected no `model.weights_file` with random weights. Received: model.weights_file='a.h5'. "
            'Leave it empty, or set model.weights to "imagenet".',
        ),
        (
            [HUB, "model.weights_file=a.h5"],
            "Expected no `model.weights_file` with a model of TensorFlow Hub, which brings its own. "
            "Received: model.weights_file='a.h5'. Leave it empty, or take a backbone by name.",
        ),
        (
            [HUB, "model.weights=random"],
            "Expected `model.weights` of imagenet with a model of TensorFlow Hub, which brings its own weights. "
            "Received: model.weights='random'. Leave it out, or take a backbone by name.",
        ),
    ],
)
def test_config_refuses_settings_of_weights_that_would_do_nothing(overrides, message):
    assert _error(overrides=overrides) == message


def test_load_config_explains_a_missing_file(tmp_path):
    path = str(tmp_path / "nowhere.toml")

    with pytest.raises(InputError) as caught:
        load_config(path, environment={})

    assert str(caught.value) == f"Expected --config to be a TOML file. Received: {path!r}: No such file or directory."


@pytest.mark.parametrize("content", [b"training.epochs = \n", b"\xff"])
def test_load_config_explains_a_file_that_is_no_toml(tmp_path, content):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)

    with pytest.raises(InputError) as caught:
        load_config(str(path), environment={})

    assert str(caught.value).startswith(f"Expected {path} to be TOML. Received: ")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["data.input=/a/My Photos/"], "my-photos"),
        (["data.input=/a/flowers_2024.csv"], "flowers-2024"),
        (["data.input=gs://bucket/records"], "records"),
        (["data.input=/a/ü"], "images"),
        (["data.input=/a/photos", "pipeline.name=cells"], "cells"),
        ([], "elpv"),
    ],
)
def test_config_makes_the_pipeline_s_name_of_the_data(settings, name):
    assert _load(overrides=settings).pipeline_name == name


def test_config_makes_a_name_that_vertex_takes_of_a_long_one():
    name = _load(overrides=[f"data.input={'long-' * 60}"]).pipeline_name

    require_name(name)
    assert name.startswith("long-long-")
    assert Config.model_validate({"pipeline": {"name": name}}).pipeline_name == name


def test_config_is_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().preset = "smoke"


@pytest.mark.parametrize("override", ["preset=[1]", "preset.x=1"])
def test_load_config_explains_a_preset_that_is_no_name(override):
    with pytest.raises(InputError, match="Expected `preset` to be one of smoke, default"):
        load_config(overrides=[override], environment={})


@pytest.mark.parametrize(("text", "name"), [("2024", "2024"), ("2024-01-01", "2024-01-01")])
def test_load_config_takes_a_name_that_looks_like_a_number_or_a_date(text, name):
    assert load_config(overrides=[f"pipeline.name={text}"], environment={}).pipeline_name == name
