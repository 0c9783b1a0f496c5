"""Every invalid configuration is refused where it is made, with what was expected and what was given."""

import pytest
from peft import PeftConfig, get_peft_config

from mllm_demo.moe_lora import MoeLoraConfig


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"r": 0}, "`r` must be an integer above 0, got 0"),
        ({"r": True}, "`r` must be an integer above 0, got True"),
        ({"plain_r": -1}, "`plain_r` must be None or an integer above 0, got -1"),
        ({"num_experts": 0}, "`num_experts` must be an integer above 0, got 0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"must be at most num_experts \(2\), got 3"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be an integer above 0, got 0"),
        ({"lora_alpha": 0}, "`lora_alpha` must be a number above 0, got 0"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must be a number in \[0, 1\), got 1.0"),
        ({"router_temperature": 0.0}, "`router_temperature` must be a number above 0, got 0.0"),
        ({"router_noise_std": -0.1}, "`router_noise_std` must be a number of at least 0, got -0.1"),
        ({"router_aux_loss_coef": -1}, "`router_aux_loss_coef` must be a number of at least 0, got -1"),
        ({"shared_expert_weighting": "half"}, "one of 'constant', 'complement', got 'half'"),
        ({"router_input": "prompt"}, "one of 'hidden', 'prompt_mean', got 'prompt'"),
        ({"router_scope": "head"}, "one of 'module', 'block', 'layer', 'model', got 'head'"),
        ({"granularity": "word"}, "one of 'token', 'sequence', 'modality', got 'word'"),
        ({"router_norm": "layer"}, "one of 'rms', 'rms_weighted', 'none', got 'layer'"),
        ({"router_softmax_dtype": "bfloat16"}, "one of 'float32', 'float16', got 'bfloat16'"),
        ({"adapter_dtype": "float16"}, "one of 'float32', 'model', got 'float16'"),
        ({"router_input": "prompt_mean", "decode_choice": "new"}, "one of 'kept', 'recomputed', got 'new'"),
        ({"router_input": "prompt_mean", "prompt_region": "all"}, "one of 'prompt', 'first_user_turn', got 'all'"),
        ({"decode_choice": "recomputed"}, "`decode_choice` must be 'kept' unless router_input='prompt_mean'"),
        ({"prompt_region": "first_user_turn"}, "`prompt_region` must be 'prompt' unless router_input='prompt_mean'"),
        ({"granularity": "modality", "num_modalities": 1}, "`num_modalities` must be at least 2"),
        ({"granularity": "modality", "router_bias": True}, "`router_bias` must be False"),
        ({"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
        ({"target_modules": ".*mlp.*", "layers_to_transform": 0}, "`layers_to_transform` cannot be used"),
        ({"task_type": "CHAT"}, "Invalid task type"),
    ],
)
def test_invalid_choice_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        MoeLoraConfig(**choices)


def test_a_prompts_mean_chooses_per_sequence():
    assert MoeLoraConfig(router_input="prompt_mean").effective_granularity == "sequence"
    assert (
        MoeLoraConfig(router_input="prompt_mean", granularity="modality").effective_granularity == "modality"
    )
    assert MoeLoraConfig().effective_granularity == "token"


def test_saved_config_comes_back_as_this_method(tmp_path):
    config = MoeLoraConfig(target_modules=["up_proj"], plain_target_modules=["q_proj"], num_experts=7)
    config.save_pretrained(str(tmp_path))

    loaded = PeftConfig.from_pretrained(str(tmp_path))

    assert isinstance(loaded, MoeLoraConfig)
    assert loaded == config
    assert isinstance(get_peft_config(loaded.to_dict()), MoeLoraConfig)
