"""What one pipeline has on Vertex AI at one moment, and how traffic is divided: no requests, only what follows from answers.

Everything is derived from Vertex AI itself: the alias `default` is on the version that serves, `previous` on the one that
served before it, `canary` on the one that was last put on trial; labels say what a version was made of. Called by
`pipeline.endpoints` and what it uses.
"""

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from google.cloud.aiplatform_v1 import types

PIPELINE_LABEL = "tfx-vision-pipeline"
RUN_LABEL = "tfx-vision-run"
CODE_LABEL = "tfx-vision-code"
DIGEST_LABEL = "tfx-vision-digest"  # of the SavedModel, the first digits
CONTAINER_LABEL = "tfx-vision-container"  # what serves it: the same model in another container is another version
VERDICT_LABEL = "tfx-vision-verdict"
REFUSED, WITHDRAWN = "refused", "withdrawn"  # by the check of a canary; by a person's rollback
DEFAULT_ALIAS, PREVIOUS_ALIAS, CANARY_ALIAS = "default", "previous", "canary"

_MAX_LABEL = 63  # characters
_MAX_STEM = 40  # characters of a name that become part of an id, which may have 63 in all


class CanaryError(RuntimeError):
    """A model on trial does not answer as it should."""


def label_value(text: str) -> str:
    """Returns text as the value of a label may be; what had to be changed or cut gets a digest, so that it stays unique."""
    value = re.sub(r"[^a-z0-9_-]+", "-", text.lower())
    if value == text and len(value) <= _MAX_LABEL:
        return value
    return f"{value[: _MAX_LABEL - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def resource_id(name: str) -> str:
    """Returns the id of the model of a pipeline, or of the endpoint of a name: the same each time, another for each name."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if text == name and len(text) <= _MAX_STEM:
        return f"tfx-vision-{text}"
    return f"tfx-vision-{text[:_MAX_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def last_part(name: str) -> str:
    """Returns the id in a resource's name, without a version.

    Names are compared by it, as Google answers with the project's number in the place of its id.
    """
    return name.rpartition("/")[2].partition("@")[0]


def split_traffic(split: Mapping[str, int], chosen: str, share: int, *, heir: str = "") -> dict[str, int]:
    """Gives one deployed model a share of the traffic; the others divide the rest as they divided it before.

    Args:
      split: deployed model's id -> percentage, with a sum of 100, or empty.
      chosen: id of the deployed model, which `split` need not have.
      share: percentage for it, in [0, 100].
      heir: id of the one that gets the rest where no other has traffic; empty for none.

    Returns:
      As `split`, with a sum of 100, and without shares of 0; empty where nobody is left.
    """
    others = {key: value for key, value in sorted(split.items()) if key != chosen and value}
    if not others and heir:
        others = {heir: 1}
    if not others:
        return {chosen: 100} if share else {}
    total, rest = sum(others.values()), 100 - share
    shares = {key: value * rest // total for key, value in others.items()}
    # What rounding down has left goes to the largest remainders.
    by_remainder = sorted(others, key=lambda key: -(others[key] * rest % total))
    for key in by_remainder[: rest - sum(shares.values())]:
        shares[key] += 1
    return {key: value for key, value in {**shares, chosen: share}.items() if value}


@dataclasses.dataclass(frozen=True)
class State:
    """What there is at one moment.

    Attributes:
      endpoint: with all deployed models.
      versions: of the pipeline's model, by their number, the oldest first.
      model_id: of the pipeline's model.
    """

    endpoint: types.Endpoint
    versions: Mapping[str, types.Model]
    model_id: str

    @property
    def ours(self) -> list[types.DeployedModel]:
        """The deployed versions of the pipeline's model, the oldest deployment first."""
        deployed = [one for one in self.endpoint.deployed_models if last_part(one.model) == self.model_id]
        return sorted(deployed, key=_deployed_at)

    def deployed(self, version: str) -> types.DeployedModel | None:
        """Returns the deployment of a version, or None."""
        return next((one for one in self.ours if one.model_version_id == version), None)

    def share(self, deployed: types.DeployedModel) -> int:
        """Returns the percentage of the traffic that goes to a deployed model."""
        return self.endpoint.traffic_split.get(deployed.id, 0)

    def with_alias(self, alias: str) -> str:
        """Returns the number of the version that has an alias; empty where none has it."""
        return next((number for number, version in self.versions.items() if alias in version.version_aliases), "")

    def verdict(self, version: str) -> str:
        """Returns `REFUSED`, `WITHDRAWN` or nothing."""
        return self.versions[version].labels.get(VERDICT_LABEL, "") if version in self.versions else ""

    def is_accepted(self, version: str) -> bool:
        """Tells whether a version is the default one by a rollout that ended; a model's first is so from the beginning."""
        aliases = self.versions[version].version_aliases if version in self.versions else ()
        return DEFAULT_ALIAS in aliases and CANARY_ALIAS not in aliases

    def trials(self) -> list[types.DeployedModel]:
        """Returns the deployments with traffic whose rollout has not ended."""
        return [one for one in self.ours if self.share(one) and not self.is_accepted(one.model_version_id)]

    def others(self, version: str) -> list[types.DeployedModel]:
        """Returns the deployments of all versions but one."""
        return [one for one in self.ours if one.model_version_id != version]

    def incumbent(self, version: str) -> types.DeployedModel | None:
        """Returns the deployment that serves while a version is on trial: the default one, else the one with most traffic."""
        default = self.with_alias(DEFAULT_ALIAS)
        return max(self.others(version), key=lambda one: (one.model_version_id == default, self.share(one)), default=None)

    def idle(self) -> list[types.DeployedModel]:
        """Returns the deployments of the pipeline's model that have no traffic."""
        return [one for one in self.ours if not self.share(one)]

    def describe_traffic(self, split: Mapping[str, int]) -> str:
        """Says who has the traffic, a sentence without its full stop.

        Args:
          split: deployed model's id -> percentage; the endpoint's, or what it has become since.
        """
        names = {
            one.id: f"version {one.model_version_id}" if one in self.ours else f"the model {last_part(one.model)}"
            for one in self.endpoint.deployed_models
        }
        shares = [(names.get(key, f"the deployed model {key}"), share) for key, share in split.items() if share]
        if not shares:
            return "The endpoint serves no model now"
        parts = " and ".join(f"{name} has {'all' if share == 100 else f'{share} %'}" for name, share in shares)
        return f"{parts[0].upper()}{parts[1:]} of the traffic"

    def describe(self) -> dict[str, Any]:
        """Returns it for JSON: `model`, `versions` and `deployed`, the latest first; times are in UTC."""
        return {
            "model": self.model_id,
            "versions": [_describe_version(version) for version in reversed(self.versions.values())],
            "deployed": [
                self._describe_deployed(one) for one in sorted(self.endpoint.deployed_models, key=_deployed_at, reverse=True)
            ],
        }

    def _describe_deployed(self, one: types.DeployedModel) -> dict[str, Any]:
        is_ours, machine = last_part(one.model) == self.model_id, one.dedicated_resources.machine_spec
        role = ("on trial" if self.share(one) else "idle") if is_ours else "other"
        return {
            "id": one.id,
            "model": one.model,
            "is_ours": is_ours,
            "version": one.model_version_id,
            "role": "default" if is_ours and one.model_version_id == self.with_alias(DEFAULT_ALIAS) else role,
            "traffic_percent": self.share(one),
            "machine_type": machine.machine_type,
            "accelerator_type": machine.accelerator_type.name if machine.accelerator_count else "",
            "accelerator_count": machine.accelerator_count,
            "min_replicas": one.dedicated_resources.min_replica_count,
            "max_replicas": one.dedicated_resources.max_replica_count,
            "deployed": _moment(one.create_time),
        }


def _deployed_at(one: types.DeployedModel) -> float:
    """Returns when a model was deployed, in seconds of the epoch."""
    return one.create_time.timestamp() if one.create_time else 0.0


def _describe_version(version: types.Model) -> dict[str, Any]:
    labels = version.labels
    return {
        "version": version.version_id,
        "aliases": sorted(version.version_aliases),
        "verdict": labels.get(VERDICT_LABEL, ""),
        "digest": labels.get(DIGEST_LABEL, ""),
        "run": labels.get(RUN_LABEL, ""),
        "code": labels.get(CODE_LABEL, ""),
        "artifact_uri": version.artifact_uri,
        "uploaded": _moment(version.version_create_time),
        "description": version.version_description,
    }


def _moment(time: datetime.datetime | None) -> str | None:
    return time.astimezone(datetime.UTC).isoformat(timespec="seconds") if time else None
