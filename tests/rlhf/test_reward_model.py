"""A reward model says the same whatever stands beside a response, and the same again when it is loaded."""

import json

import numpy as np
import pytest
import torch
from mixed import Tokenizer, dataset, examples, model
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from uft.collation import Collator
from uft.feedback import Example, Response
from uft.head import fuse_head
from uft.models import score
from uft.rlhf.reward import RewardEnsemble, RewardModel
from uft.rlhf.reward_model import padding_of, scores

GPT2_CONFIG = GPT2Config(
    vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2
)


@pytest.fixture(scope="module")
def reward_model():
    return RewardModel.of(model(), Tokenizer(), seed=1)


def flat(rewards):
    return [value for each in rewards for value in each]


def test_the_reward_is_the_head_at_the_last_token(reward_model):
    """As transformers computes it for each prompt and response alone."""
    data = examples("pairs", 6)
    expected = []
    with torch.no_grad():
        for example in data:
            for response in example.responses:
                ids = torch.tensor(np.concatenate([example.prompt, response.tokens]))[None]
                expected.append(reward_model.model(input_ids=ids).logits[0, 0].item())
    assert flat(reward_model(data)) == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.05  # or anything would do


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neighbours_change_nothing_and_order_is_kept(reward_model, batch_size):
    data = [*examples("pairs", 7), *examples("scores", 5)]
    alone = [reward_model([example])[0] for example in data]
    together = reward_model(data, batch_size=batch_size)
    assert [len(each) for each in together] == [2] * 7 + [1] * 5
    assert flat(together) == pytest.approx(flat(alone), abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("absolute", [False, True])
def test_padding_side_and_width_change_nothing(reward_model, side, absolute):
    """Rotary positions are relative; those of GPT-2 are not, and padding on the left would shift them."""
    data = examples("pairs", 6)
    if absolute:
        reward_model = RewardModel.of(AutoModelForCausalLM.from_config(GPT2_CONFIG), Tokenizer())
    batch = Collator(0, ("pairs",), padding_side=side, pad_to_multiple_of=32)(data)
    assert reward_model.rewards(batch).tolist() == pytest.approx(flat(reward_model(data)), abs=1e-5)


def test_a_response_that_ends_with_the_padding_token_is_read_to_its_end():
    class PadsWithEnd(Tokenizer):
        pad_token_id, unk_token_id, bos_token_id = 2, None, None

    ended, longer = (Response(np.array(ids, dtype=np.int32)) for ids in ([5, 6, 2], [5, 6, 7, 8, 9, 2]))
    data = [Example("score", np.array([4], dtype=np.int32), (ended, longer))]
    reward_model = RewardModel.of(model(), PadsWithEnd())
    assert reward_model.pad_token_id == 2
    with torch.no_grad():
        hidden = reward_model.model.base_model(torch.tensor([[4, 5, 6, 2]])).last_hidden_state[0, -1]
        expected = reward_model.model.score(hidden).item()
    assert reward_model(data)[0][0] == pytest.approx(expected, abs=1e-5)


def test_padding_is_a_token_that_ends_no_response():
    tokenizer = Tokenizer()
    tokenizer.pad_token_id = tokenizer.eos_token_id  # then the beginning of a sequence is the next best
    assert padding_of(tokenizer) == tokenizer.bos_token_id
    tokenizer.pad_token_id = 0
    assert padding_of(tokenizer) == 0


def test_the_body_is_the_policys_and_the_head_the_seeds():
    policy = model(3)
    first, second, other = (RewardModel.of(policy, Tokenizer(), seed=seed) for seed in (0, 0, 1))
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, first.model.model.state_dict()[name]), name
    assert torch.equal(first.model.score.weight, second.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    # weights of its own
    first.model.model.embed_tokens.weight.data.zero_()
    assert policy.model.embed_tokens.weight.any()


def test_making_one_draws_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(3)
    policy = model()
    torch.manual_seed(0)
    RewardModel.of(policy, Tokenizer())
    assert torch.equal(torch.rand(3), expected)


def test_adapters_are_folded_in_and_the_policy_keeps_its_own():
    policy = get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fuse_head(policy)
    batch = Collator(0, ("pairs",))(examples("pairs", 4))
    with torch.no_grad():
        hidden = policy.get_base_model().model(batch.input_ids, attention_mask=batch.attention_mask)[0]
        found = RewardModel.of(policy, Tokenizer())
        own = found.model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0]
        kept = batch.attention_mask.bool()
        torch.testing.assert_close(own[kept], hidden[kept], atol=1e-5, rtol=1e-5)
        assert hasattr(policy, "peft_config") and score(policy, batch).logp.isfinite().all()


def test_calibrated_rewards_have_mean_0_and_deviation_1(reward_model):
    data = examples("pairs", 16)
    before, found = np.array(flat(reward_model(data))), reward_model.calibrated(data)
    after = np.array(flat(found(data)))
    assert (after.mean(), after.std()) == pytest.approx((0, 1), abs=1e-5)
    assert (np.argsort(after) == np.argsort(before)).all()
    again = found.calibrated(data[:8])  # from its own centre and scale
    assert np.array(flat(again(data[:8]))).mean() == pytest.approx(0, abs=1e-5)
    assert again.rewards(Collator(0, ("pairs",))(data[:8])).std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_calibration_wants_rewards_that_differ(reward_model):
    with pytest.raises(ValueError, match="found 1 responses to calibrate on"):
        reward_model.calibrated(examples("scores", 1))


def test_gradients_reach_body_and_head(reward_model):
    batch = Collator(0, ("pairs",))(examples("pairs", 4))
    rewards = reward_model.rewards(batch)
    assert rewards.dtype == torch.float32 and rewards.shape == (8,)
    rewards.sum().backward()
    assert all(p.grad is not None for p in reward_model.model.parameters())
    reward_model.model.zero_grad()


def test_saved_and_loaded_it_says_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    data = examples("pairs", 6)
    found = RewardModel.of(tiny_model(tokenizer, 0), tokenizer, seed=2).calibrated(data)
    found.training_record = {"examples": 3}
    found.save(tmp_path / "rm")
    found.save(tmp_path / "rm")  # over an earlier one
    loaded = RewardModel.load(tmp_path / "rm")
    assert loaded(data) == found(data)
    assert loaded.training_record == {"examples": 3}
    assert not any(path.suffix == ".bin" for path in (tmp_path / "rm").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]  # nothing is left aside

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    batch = Collator(loaded.pad_token_id, ("pairs",))(data)
    with torch.no_grad():
        raw = plain(batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    torch.testing.assert_close((raw - found.center) / found.scale, found.rewards(batch).detach())


def test_another_folder_is_not_written_over(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"precious: holds thesis\.tex and no reward\.json"):
        RewardModel.of(model(), Tokenizer()).save(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_language_model_is_no_reward_model(tmp_path):
    model().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        RewardModel.load(tmp_path / "lm", Tokenizer())
    with pytest.raises(ValueError, match="no reward model; want a sequence classification"):
        RewardModel(model(), Tokenizer())
    with pytest.raises(ValueError, match="scale > 0"):
        RewardModel(RewardModel.of(model(), Tokenizer()).model, Tokenizer(), scale=0.0)


def test_a_packed_batch_is_refused(reward_model):
    with pytest.raises(ValueError, match="padded batches"):
        scores(reward_model.model, Collator(0, ("pairs",), packed=True)(examples("pairs", 2)))


# ---- ensembles ----


def fixed(*rewards):
    return lambda data: [list(each) for each in rewards]


def test_an_ensemble_by_hand():
    """Members say (1, 3) and (3, 3): mean (2, 3), deviation (1, 0)."""
    data = examples("pairs", 1)
    ensemble = RewardEnsemble([fixed((1.0, 3.0)), fixed((3.0, 3.0))])
    assert ensemble(data) == [[2.0, 3.0]]
    assert ensemble.spread(data) == [[1.0, 0.0]]
    assert ensemble.conservative(0.5)(data) == [[1.5, 3.0]]


def test_an_ensemble_of_models_and_ragged_examples(reward_model):
    data = [*examples("pairs", 3), *examples("scores", 2)]
    other = RewardModel.of(model(5), Tokenizer())
    ensemble = RewardEnsemble([reward_model, other])
    means = [[(a + b) / 2 for a, b in zip(x, y)] for x, y in zip(reward_model(data), other(data))]
    assert flat(ensemble(data)) == pytest.approx(flat(means), abs=1e-6)
    assert [len(each) for each in ensemble.spread(data)] == [2, 2, 2, 1, 1]


def test_one_member_cannot_disagree():
    for ask in (lambda e: e.spread([]), lambda e: e.conservative(1.0)):
        with pytest.raises(ValueError, match="found one member"):
            ask(RewardEnsemble([fixed((1.0,))]))
    with pytest.raises(ValueError, match="found no members"):
        RewardEnsemble([])
    with pytest.raises(ValueError, match="k is -1"):
        RewardEnsemble([fixed((1.0,)), fixed((1.0,))]).conservative(-1)


def test_dataset_rows_are_examples_too(reward_model):
    assert len(reward_model(dataset(("pairs",), 4))) == 4
    assert json.dumps(reward_model(examples("pairs", 1)))  # plain numbers
