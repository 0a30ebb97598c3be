import pytest
from mlx_lm.lora import build_parser

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.lora import check_reporting, lora_parser, reporting_callback


def options_of(parser):
    return {name for action in parser._actions for name in action.option_strings}


def test_every_option_of_mlx_lm_is_there_but_those_to_leave_out():
    everything = options_of(build_parser())
    assert options_of(lora_parser("tool")) == everything
    assert options_of(lora_parser("tool", without={"--batch-size"})) == everything - {"--batch-size"}
    assert lora_parser("tool").format_usage().startswith("usage: tool ")


def test_options_are_written_out():
    with pytest.raises(SystemExit):
        lora_parser("tool").parse_args(["--batch-siz", "4"])


@pytest.mark.parametrize("named", [None, "", "wandb", "SwanLab, wandb"])
def test_services_that_mlx_lm_reports_to(named):
    check_reporting({"report_to": named})


def test_others_are_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"'wandb, abacus'.*not to 'abacus'"):
        check_reporting({"report_to": "wandb, abacus"})


def test_nothing_is_called_back_where_nobody_is_named(tmp_path):
    settings = {"report_to": None, "project_name": None, "adapter_path": str(tmp_path)}
    assert reporting_callback(settings) is None
