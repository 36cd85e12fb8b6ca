import contextlib
import tempfile
import threading
from pathlib import Path

import endpoint_models
import pytest
import vertex_stand_in
from endpoint_models import NUM_IMAGES, Kill, KilledError, Shop, answer_of, refuse
from google.api_core import exceptions
from vertex_stand_in import Fault

from data.errors import InputError
from pipeline import cloud_calls

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
shop = endpoint_models.shop


_ALL, _HALF = (100,), (50,)
# What is deployed before, with its steps; the command; and its error, if it ends in one.
SCENARIOS = {
    "first model": ([], lambda shop: shop.deploy(1), None),
    "next version": ([(1, _ALL)], lambda shop: shop.deploy(2), None),
    "canary": ([(1, _ALL)], lambda shop: shop.deploy(2, steps=_HALF), None),
    "refused canary": ([(1, _ALL)], lambda shop: shop.deploy(2, answer=refuse), RuntimeError),
    "refused first model": ([], lambda shop: shop.deploy(1, answer=refuse), RuntimeError),
    "promotion": ([(1, _ALL), (2, _HALF)], lambda shop: shop.rollout().promote(None, _ALL), None),
    "rollback of a third version's canary": (
        [(1, _ALL), (2, _ALL), (3, _HALF)],
        lambda shop: shop.rollout().rollback(),
        None,
    ),
    "rollback of a canary": ([(1, _ALL), (2, _HALF)], lambda shop: shop.rollout().rollback(), None),
    "rollback": ([(1, _ALL), (2, _ALL)], lambda shop: shop.rollout().rollback(), None),
    "rollback to a version": ([(1, _ALL), (2, _ALL), (3, _ALL)], lambda shop: shop.rollout().rollback("1"), None),
    "clean-up": (
        [(1, _ALL), (2, _HALF)],
        lambda shop: shop.rollout().undeploy(everything=True, delete_endpoint=True),
        None,
    ),
}


@pytest.fixture
def make_shop(tmp_path, monkeypatch):
    """Gives `make_shop()`, one world after the other."""
    monkeypatch.setattr(cloud_calls, "POLLING", cloud_calls.POLLING.with_delay(0.01, 0.01).with_timeout(20))
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.02).with_timeout(60.0))
    with contextlib.ExitStack() as stack:

        def make():
            stack.close()
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            cloud = stack.enter_context(vertex_stand_in.VertexStandIn(folder))
            for name, value in cloud.environment.items():
                monkeypatch.setenv(name, value)
            shop = Shop(cloud)
            shop.configure(canary_images=1, traffic_steps=(50, 100))
            return shop

        yield make


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_command_may_be_killed_after_every_change_and_repeated(make_shop, monkeypatch, scenario):
    """A request that only reads changes nothing, so that a kill after it is one after the change before."""
    before, command, error = SCENARIOS[scenario]
    kill = Kill(monkeypatch)

    def prepare():
        shop = make_shop()
        for number, steps in before:
            shop.deploy(number, steps=steps, references=None)
        return shop, len(shop.cloud.sent("UploadModel"))

    def run(shop):
        with pytest.raises(error) if error else contextlib.nullcontext():
            command(shop)

    def find(shop, num_uploads):
        num_uploads = len(shop.cloud.sent("UploadModel")) - num_uploads
        return shop.traffic, shop.versions, len(shop.cloud.endpoints), num_uploads

    shop, num_uploads = prepare()
    answers = kill.find_changes(shop.cloud, lambda: run(shop))
    final = find(shop, num_uploads)
    assert len(answers) >= 3
    for at in answers:
        shop, num_uploads = prepare()
        kill.start(at)
        with pytest.raises(KilledError):
            command(shop)
        kill.start()
        # After the last change there may be nothing left to do, which a command says.
        with contextlib.suppress(*[InputError] if at == answers[-1] else []):
            run(shop)
        assert find(shop, num_uploads) == final, f"killed after answer {at} of {answers}"


@pytest.mark.parametrize("method", ["CreateEndpoint", "UploadModel", "DeployModel", "UndeployModel"])
def test_a_command_waits_for_what_a_killed_one_has_begun(make_shop, monkeypatch, method):
    shop, kill = make_shop(), Kill(monkeypatch)
    if method != "CreateEndpoint":
        shop.deploy(1)
    num_before = len(shop.cloud.sent(method))
    shop.cloud.operation_seconds[method] = 600.0
    kill.on_answer = lambda: setattr(kill, "at", kill.count if len(shop.cloud.sent(method)) > num_before else None)
    with pytest.raises(KilledError):
        shop.deploy(2)
    kill.start()
    waited = []

    def report(text):
        if text.startswith("Waiting for what is under way already: projects/"):
            waited.append(text)
            shop.cloud.operation_seconds.clear()
            shop.cloud.end_operations()

    shop.deploy(2, report=report)

    assert waited
    assert (list(shop.traffic.values()), len(shop.cloud.endpoints)) == ([100], 1)
    assert len(shop.cloud.sent(method)) == num_before + 1


def test_deploy_model_gives_the_alias_back_with_the_traffic(shop, monkeypatch):
    """Where the new model got the alias and the answer was an error: who serves and who is the default must be one."""
    shop.deploy(1)
    num_before, once_more = (
        len(shop.cloud.sent("MergeVersionAliases")),
        Fault(exceptions.InternalServerError("oops"), "answer_lost"),
    )

    def on_answer():
        if len(shop.cloud.sent("MergeVersionAliases")) == num_before + 1 and not shop.cloud.faults:  # `previous` is given
            shop.cloud.faults.append(("MergeVersionAliases", once_more))

    kill = Kill(monkeypatch)
    kill.on_answer = on_answer

    with pytest.raises(
        RuntimeError, match=r"Expected Vertex AI to give version 2 the alias -canary, default. .* Version 1 has"
    ):
        shop.deploy(2)

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default", "previous"], ""), ([], "")])


def test_deploy_model_checks_a_first_model_again_where_it_was_killed_meanwhile(shop, monkeypatch):
    """It is the default version from the beginning and has all of the traffic, so that nothing else tells."""
    with pytest.raises(RuntimeError, match="is refused"):
        shop.deploy(1, answer=refuse)
    kill = Kill(monkeypatch)
    kill.on_answer = lambda: setattr(kill, "at", kill.count if shop.traffic == {"1": 100} else None)
    with pytest.raises(KilledError):
        shop.deploy(1)
    kill.start()
    since = len(shop.cloud.sent("Predict"))

    shop.deploy(1)

    assert len(shop.cloud.sent("Predict")) == since + NUM_IMAGES
    assert shop.versions == [(["default"], "")]


def test_deploy_model_takes_one_version_on_trial_at_a_time(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    message = r"Expected no other version on trial on the endpoint flowers. Received: version 2 with 10 %. End that first"

    for number in (3, 1):
        with pytest.raises(InputError, match=message):
            shop.deploy(number)

    assert shop.traffic == {"1": 90, "2": 10}
    assert shop.versions[:2] == [(["default"], ""), (["canary"], "") if len(shop.versions) == 2 else ([], "")]


def test_deploy_model_gives_way_to_somebody_else_s_traffic(shop):
    shop.deploy(1)
    shop.cloud.answers[shop.model(2)] = answer = answer_of(2)

    def interfere(instances):
        (endpoint,) = shop.cloud.endpoints.values()
        endpoint.traffic_split = {key: 25 if value in (10, 25) else 75 for key, value in endpoint.traffic_split.items()}
        endpoint.etag += "1"
        return answer(instances)

    with pytest.raises(RuntimeError, match=r"to be as this command left it, .*Received: .*somebody else is changing it"):
        shop.deploy(2, answer=interfere)

    assert shop.traffic == {"1": 100}


def test_deploy_model_gives_way_to_a_deployment_that_came_meanwhile(shop, monkeypatch):
    """`DeployModel` replaces the traffic by what its sender knew."""
    shop.deploy(1)
    num_before, kill = len(shop.cloud.sent("DeployModel")), Kill(monkeypatch)

    def on_answer():
        if len(shop.cloud.sent("DeployModel")) == num_before + 1:
            kill.on_answer = lambda: None
            (endpoint,) = shop.cloud.endpoints.values()
            endpoint.traffic_split = {endpoint.deployed_models[0].id: 90, "77": 10}

    kill.on_answer = on_answer

    with pytest.raises(RuntimeError, match=r"to be as this command left it, .* Version 1 has 90 % and .* 77 has 10 % of the"):
        shop.deploy(2)

    assert shop.traffic == {"1": 90}


def test_deploy_model_gives_way_to_a_rollback_during_its_last_check(shop):
    shop.configure(canary_images=1)
    shop.deploy(1)
    answer = answer_of(2)

    def roll_back(instances):
        if shop.traffic.get("2") == 100:
            shop.rollout().rollback()
        return answer(instances)

    with pytest.raises(RuntimeError, match=r"version 2 to have all of the traffic .* still\. .* Version 1 has all of the"):
        shop.deploy(2, answer=roll_back)

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "withdrawn")])


def test_deploy_model_lets_nothing_pass_a_version_killed_during_its_last_check(shop, monkeypatch):
    shop.deploy(1)
    kill = Kill(monkeypatch)
    kill.on_answer = lambda: setattr(kill, "at", kill.count if shop.traffic.get("2") == 100 else None)
    with pytest.raises(KilledError):
        shop.deploy(2)
    kill.start()

    with pytest.raises(InputError, match=r"Received: version 2 with 100 %\. End that first"):
        shop.deploy(3)

    assert shop.traffic == {"1": 0, "2": 100}
    shop.rollout().promote(None, (100,))
    assert shop.traffic == {"2": 100}
    shop.deploy(3)
    assert shop.traffic == {"3": 100}


def test_deploy_model_of_two_at_once_leaves_one_that_serves(shop):
    shop.deploy(1)
    shop.cloud.operation_seconds["DeployModel"] = 0.1
    results = {}

    def run(number):
        try:
            results[number] = shop.deploy(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    done = [number for number, result in results.items() if not isinstance(result, Exception)]
    (versions,) = shop.cloud.models.values()
    (serving,) = [version for version, share in shop.traffic.items() if share == 100]
    assert shop.traffic == {serving: 100}, results
    assert "default" in versions[serving].version_aliases
    assert len(done) == (serving != "1") or len(done) == 2  # one after the other
