"""Whose permissions and roles `kubeflow_runner.py --check` asks for, against the stand-in's REST APIs."""

import re

import cloud_apis
import pytest
import vertex_stand_in
from cloud_apis import ACCOUNT, ME, NUMBER, PROJECT, ROLES, lines, problems, settings
from google_cloud_network import HttpsAnswer

from pipeline.cloud_check import check_cloud

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
apis = cloud_apis.apis


@pytest.mark.parametrize(
    ("permission", "subject", "command"),
    [
        (
            "aiplatform.pipelineJobs.create",
            "your permissions",
            f"gcloud projects add-iam-policy-binding {PROJECT} --member={ME} --condition=None --role=roles/aiplatform.user",
        ),
        (
            "iam.serviceAccounts.actAs",
            "service account",
            f"gcloud iam service-accounts add-iam-policy-binding {ACCOUNT} --role=roles/iam.serviceAccountUser --member={ME}",
        ),
    ],
)
def test_check_gives_the_command_for_a_permission(apis, capfd, permission, subject, command):
    apis.permissions.remove(permission)

    assert check_cloud(settings()) == 2
    ((state, where, text),) = problems(capfd)
    assert (state, where) == ("missing", subject)
    assert text.endswith(f"Give: {command}")


def test_check_names_an_account_that_is_not_there(apis, capfd):
    apis.accounts.clear()

    assert check_cloud(settings()) == 2
    assert problems(capfd) == [
        (
            "missing",
            "service account",
            f"{ACCOUNT} is not there. Create it: gcloud iam service-accounts create steps --project={PROJECT}",
        )
    ]


def test_check_names_an_account_that_is_not_there_whatever_is_said_of_permissions_on_it(apis, google_cloud, capfd):
    apis.accounts.clear()
    google_cloud.network.https.append((r"iam\.googleapis\.com/.*:testIamPermissions", lambda request: HttpsAnswer()))

    assert check_cloud(settings()) == 2
    assert problems(capfd)[0][2].startswith(f"{ACCOUNT} is not there. Create it: ")


@pytest.mark.parametrize("is_there", [True, False])
def test_check_says_where_it_cannot_tell_whether_the_account_is_there(apis, capfd, is_there):
    apis.may_see_accounts = False
    apis.permissions.remove("iam.serviceAccounts.actAs")
    apis.accounts = {ACCOUNT} if is_there else set()

    assert check_cloud(settings()) == 2
    assert problems(capfd) == [
        (
            "missing",
            "service account",
            f"{ACCOUNT} is not there, or you may not let steps act as it; Google Cloud does not tell which. "
            f"Those that are there: gcloud iam service-accounts list --project={PROJECT}. Give: gcloud iam service-accounts "
            f"add-iam-policy-binding {ACCOUNT} --role=roles/iam.serviceAccountUser --member={ME}",
        )
    ]


def test_check_of_an_account_whose_project_its_name_does_not_tell(apis, capfd):
    other = "7-compute@developer.gserviceaccount.com"
    apis.roles = {other: ["roles/editor"]}

    assert check_cloud(settings(f"vertex.service_account={other}")) == 2
    assert problems(capfd)[0][2].startswith(f"{other} is not there, or you may not let steps act as it; Google Cloud does not")
    apis.accounts = {other}
    assert check_cloud(settings(f"vertex.service_account={other}")) == 0


def test_check_asks_nothing_of_an_account_that_may_be_used(apis):
    apis.may_see_accounts = False

    assert check_cloud(settings()) == 0


@pytest.mark.parametrize("role", ROLES)
def test_check_names_a_role_that_the_steps_lack(apis, capfd, role):
    apis.roles[ACCOUNT].remove(role)

    assert check_cloud(settings()) == 2
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("missing", "its roles")
    assert text.startswith(f"{ACCOUNT} has no {role} (")
    assert text.endswith(
        f"gcloud projects add-iam-policy-binding {PROJECT} --member=serviceAccount:{ACCOUNT} --condition=None --role={role}"
    )


def test_check_gives_one_command_for_several_roles(apis, capfd):
    apis.roles.clear()

    assert check_cloud(settings()) == 2
    ((_, _, text),) = problems(capfd)
    assert set(re.search(r"for role in (.*?);", text)[1].split()) == set(ROLES)
    assert text.endswith("--role=$role; done")


@pytest.mark.parametrize("role", ["roles/editor", "roles/owner"])
def test_check_takes_a_basic_role_for_all_of_them(apis, role):
    apis.roles = {ACCOUNT: [role]}

    assert check_cloud(settings()) == 0


def test_check_takes_a_role_on_the_account_itself(apis):
    apis.roles[ACCOUNT].remove("roles/iam.serviceAccountUser")
    apis.account_roles = {ACCOUNT: ["roles/iam.serviceAccountUser"]}

    assert check_cloud(settings()) == 0


def test_check_without_a_service_account_looks_at_compute_engine_s(apis, capfd):
    default = f"{NUMBER}-compute@developer.gserviceaccount.com"
    apis.accounts, apis.roles = {default}, {default: ["roles/editor"]}

    assert check_cloud(settings("vertex.service_account=")) == 0
    assert ("ok", "service account", f"{default}, which you may let steps act as") in lines(capfd)


def test_check_without_a_service_account_says_that_compute_engine_s_is_not_there(apis, capfd):
    default = f"{NUMBER}-compute@developer.gserviceaccount.com"
    apis.accounts, apis.roles = set(), {default: ["roles/editor"]}

    assert check_cloud(settings("vertex.service_account=")) == 2
    text = f"{default} is not there. Set `vertex.service_account` to one that is"
    assert problems(capfd) == [("missing", "service account", text)]


@pytest.mark.parametrize(
    ("role", "policy"),
    [
        ("roles/storage.objectAdmin", r"storage\.googleapis\.com/storage/v1/b/bucket/iam$"),
        ("roles/iam.serviceAccountUser", r"iam\.googleapis\.com/.*:getIamPolicy"),
        ("roles/artifactregistry.reader", r"artifactregistry\.googleapis\.com/.*:getIamPolicy"),
    ],
)
def test_check_does_not_call_a_role_missing_that_may_be_given_where_it_cannot_look(apis, google_cloud, capfd, role, policy):
    google_cloud.network.https.append((policy, lambda request: HttpsAnswer.error(403, "no getIamPolicy")))
    assert check_cloud(settings()) == 0

    capfd.readouterr()
    apis.roles[ACCOUNT].remove(role)

    assert check_cloud(settings()) == 1
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("unknown", "its roles")
    assert text.startswith(f"{ACCOUNT} has no {role} on the project, and you may not see whether it has on the bucket")
    assert text.endswith(f"--role={role}")
