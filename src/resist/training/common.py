"""Common: what all processes of a run must have, so that they train one network on one data set."""

from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import resist
from resist.errors import UserError
from resist.models.third_party import is_third_party
from resist.runs.config import TrainConfig
from resist.subnet.seeded import build_seeded, fingerprint
from resist.tasks import Task


def common_values(config: TrainConfig, task: Task) -> dict[str, object]:
    """Return the values that must be equal in all processes, by name.

    The network itself is compared where it is built: in `resist.job.Job`, or by `network_values`.

    Args:
        config: The options.
        task: The task, with its data.

    Raises:
        UserError: A file that describes the network cannot be read.
    """
    versions = {"resist": resist.__version__, **dict(_libraries(config))}
    return {**config.digest(), **versions, **_network_file(config.network.model), "data set": task.digest()}


def network_values(config: TrainConfig, task: Task) -> dict[str, str]:
    """Return digests of the network with its initial weights, by name. Builds it once.

    Args:
        config: The options.
        task: The task, which builds the network.
    """
    found = fingerprint(build_seeded(task.network, config.run.seed))
    return {
        "digest of the network": found["structure"],
        "digest of the initial weights (`init_from`)": found["weights"],
    }


def _libraries(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The versions of the libraries that define the network or the optimizer."""
    for name in (config.network.model, config.optimization.optimizer):
        if is_third_party(name):
            library = name.partition(":")[0]
            try:
                yield library, version(library)
            except PackageNotFoundError:  # it is refused where it is used
                continue


def _network_file(model: str) -> dict[str, str]:
    """The digest of the file that a network is configured by."""
    file = Path(model.partition(":")[2])
    if not (is_third_party(model) and file.suffix == ".json"):
        return {}
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = f"{file} cannot be read: {error.strerror}"
        raise UserError(f"`model={model}`: {reason}; give a configuration file that is there") from error
    return {f"digest of {file}": blake2b(content, digest_size=8).hexdigest()}
