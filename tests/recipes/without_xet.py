"""Makes a rank's client of the Hub use the protocol that the tests' server speaks; see `Gang.start(before=…)`."""

from huggingface_hub import constants

from kubetune_trainer import hub


def before() -> None:
    constants.HF_HUB_DISABLE_XET = True
    hub.PAUSES_SECONDS = (0.0, 0.0, 0.0)
