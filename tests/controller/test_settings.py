"""Settings come from environment variables; wrong ones are refused by name."""

import pytest

from kubetune_operator.errors import SpecError
from kubetune_operator.settings import Settings, load_settings


def test_settings_are_read_from_the_environment_and_empty_ones_keep_their_default() -> None:
    settings = load_settings(
        {
            "KUBETUNE_OPERATOR_TRAINER_IMAGE": "registry/trainer:1",
            "KUBETUNE_OPERATOR_NAMESPACES": "team-a, team-b",
            "KUBETUNE_OPERATOR_CPU_PROCESSES": "2",
            "KUBETUNE_OPERATOR_LOG_LEVEL": "",
            "KUBETUNE_OPERATOR_SERVICE_HOST": "10.0.0.1",
            "KUBETUNE_OPERATOR_PORT_8080_TCP_ADDR": "10.0.0.1",
            "PATH": "/bin",
        }
    )
    assert settings.trainer_image == "registry/trainer:1"
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.cpu_processes == 2
    assert settings.log_level == Settings().log_level


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KUBETUNE_OPERATOR_TRAINER_IMGAE", "x"),
        ("KUBETUNE_OPERATOR_WORKERS", "0"),
        ("KUBETUNE_OPERATOR_API_QPS", "fast"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(SpecError) as raised:
        load_settings({name: value})
    assert name in str(raised.value)
    assert value in str(raised.value)
