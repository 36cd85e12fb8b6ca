import datetime
import itertools
import re

import pytest
from google.cloud.aiplatform_v1 import types

from pipeline.vertex_state import State, label_value, last_part, resource_id, split_traffic

MODEL = "projects/1/locations/l/models/ours"


@pytest.mark.parametrize(
    ("split", "share", "expected"),
    [
        ({}, 10, {"new": 100}),  # nobody else could answer
        ({"a": 100}, 10, {"a": 90, "new": 10}),
        ({"a": 90, "new": 10}, 50, {"a": 50, "new": 50}),
        ({"a": 50, "new": 50}, 100, {"new": 100}),
        ({"a": 50, "new": 50}, 0, {"a": 100}),
        ({"a": 60, "b": 40}, 10, {"a": 54, "b": 36, "new": 10}),
        ({"a": 54, "b": 36, "new": 10}, 0, {"a": 60, "b": 40}),
        ({"a": 50, "b": 50}, 1, {"a": 50, "b": 49, "new": 1}),
        ({"a": 99, "b": 1}, 99, {"a": 1, "new": 99}),  # a share that rounds to nothing
        ({"a": 100, "b": 0}, 10, {"a": 90, "new": 10}),
        ({"new": 100}, 0, {}),
    ],
)
def test_split_traffic_scales_the_others(split, share, expected):
    assert split_traffic(split, "new", share) == expected


def test_split_traffic_leaves_the_rest_to_the_heir_of_one_that_had_it_all():
    assert split_traffic({"new": 100}, "new", 0, heir="old") == {"old": 100}
    assert split_traffic({"new": 100}, "new", 30, heir="old") == {"old": 70, "new": 30}
    assert split_traffic({"new": 50, "a": 50}, "new", 0, heir="old") == {"a": 100}


def test_split_traffic_always_sums_to_100():
    for first, second, share in itertools.product(range(0, 101, 7), range(0, 101, 11), range(1, 100, 3)):
        if first + second <= 100:
            split = split_traffic({"a": first, "b": second, "c": 100 - first - second}, "new", share)

            assert sum(split.values()) == 100
            assert split["new"] == share
            assert min(split.values()) > 0


@pytest.mark.parametrize("name", ["flowers", "a" * 64, "Größe 2", "x.y", "x-y", "-", "1", "A", "a" * 40, "a" * 41, "a_b"])
def test_label_value_and_resource_id_are_what_vertex_ai_takes(name):
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", label_value(name))
    assert re.fullmatch(r"tfx-vision-[a-z0-9-]{0,51}[a-z0-9]", resource_id(name))


def test_label_value_and_resource_id_tell_names_apart():
    names = ["flowers", "Flowers", "flowers ", "flowers.", "a" * 64, "a" * 65, "a_b", "a-b", "a.b"]

    for function in (label_value, resource_id):
        assert len({function(name) for name in names}) == len(names)
    assert label_value("flowers-2025_1") == "flowers-2025_1"
    assert resource_id("flowers-2025") == "tfx-vision-flowers-2025"


def test_last_part_is_the_same_for_project_id_and_number():
    assert last_part("projects/my-project/locations/l/models/ours@3") == last_part(MODEL) == "ours"


def _state() -> State:
    """Version 1 is the default one, 2 on trial, 3 idle; a model of somebody else has traffic too."""
    moment = datetime.datetime(2025, 11, 1, tzinfo=datetime.UTC)
    deployed = [
        types.DeployedModel(id=key, model=model, model_version_id=version, create_time=moment + datetime.timedelta(hours=hour))
        for hour, (key, model, version) in enumerate(
            [("12", MODEL, "2"), ("11", MODEL, "1"), ("13", MODEL, "3"), ("99", f"{MODEL}-not", "1")]
        )
    ]
    endpoint = types.Endpoint(name="e", deployed_models=deployed, traffic_split={"11": 60, "12": 10, "99": 30})
    aliases = {"1": ["default"], "2": ["canary"], "3": ["previous"]}
    versions = {key: types.Model(version_id=key, version_aliases=value) for key, value in aliases.items()}
    versions["3"].labels = {"tfx-vision-verdict": "withdrawn", "tfx-vision-digest": "d1"}
    return State(endpoint, versions, "ours")


def test_state_knows_who_serves_who_is_on_trial_and_who_is_idle():
    state = _state()

    assert [one.id for one in state.ours] == ["12", "11", "13"]
    assert [one.id for one in state.trials()] == ["12"]
    assert [one.id for one in state.idle()] == ["13"]
    assert [one.id for one in state.others("1")] == ["12", "13"]
    assert state.incumbent("2").id == "11"
    assert state.incumbent("1").id == "12"
    assert (state.with_alias("previous"), state.with_alias("none")) == ("3", "")
    assert (state.verdict("3"), state.verdict("1"), state.verdict("9")) == ("withdrawn", "", "")
    assert (state.is_accepted("1"), state.is_accepted("2")) == (True, False)


def test_state_counts_a_first_model_as_on_trial_until_its_rollout_has_ended():
    """Vertex AI makes the first version the default one by itself."""
    state = _state()
    state.versions["1"].version_aliases = ["canary", "default"]

    assert [one.id for one in state.trials()] == ["12", "11"]


def test_state_describes_itself():
    described = _state().describe()

    assert [(one["version"], one["role"], one["traffic_percent"]) for one in described["deployed"]] == [
        ("1", "other", 30),
        ("3", "idle", 0),
        ("1", "default", 60),
        ("2", "on trial", 10),
    ]
    assert described["deployed"][-1]["deployed"] == "2025-11-01T00:00:00+00:00"
    assert [(one["version"], one["aliases"], one["verdict"], one["digest"]) for one in described["versions"]] == [
        ("3", ["previous"], "withdrawn", "d1"),
        ("2", ["canary"], "", ""),
        ("1", ["default"], "", ""),
    ]
