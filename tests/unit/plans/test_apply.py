"""The plan on live models: exactly its parameters, whatever wraps the model, and proof that the rest stood still."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from freeze_plan_examples import (
    FAMILIES,
    N_BLOCKS,
    WRAPPED,
    bare_model,
    build,
    config,
    example_plan,
    groups_of,
    one_step,
    trained_names,
    wrapped_model,
)
from torch import nn

from layerprobe.errors import PlanError
from layerprobe.files import tensor_digest
from layerprobe.plans import FreezePlan, parameter_table
from layerprobe.plans.verify import Fingerprint, applied_states

BLOCKS = [0, 1, 10]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_model_trains_exactly_the_plan(family: str) -> None:
    plan, model = example_plan(family, BLOCKS), bare_model(family)
    done = plan.apply(model)
    assert trained_names(model) == set(plan.trainable)
    assert (done.prefix, done.trainable, done.frozen) == ("", len(plan.trainable), len(plan.frozen))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan.apply(model)
    assert trained_names(model) == set(plan.trainable)


@pytest.mark.parametrize("outside", ["frozen", "trainable"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_task_head_follows_its_keyword_and_the_rest_the_plan(name: str, outside: str) -> None:
    plan = example_plan(name.split("-")[0], BLOCKS)
    model, prefix = wrapped_model(name)
    done = plan.apply(model, outside=outside)
    assert done.prefix == prefix
    ours = {prefix + n for n in plan.parameters}
    around = {n for n, _ in model.named_parameters()} - ours
    expected = {prefix + n for n in plan.trainable} | (around if outside == "trainable" else set())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert done.outside == dict.fromkeys(done.outside, outside) and set(done.outside) == around


def test_parameters_outside_need_a_word() -> None:
    plan = example_plan("gpt2", BLOCKS)
    model, _ = wrapped_model("gpt2-classifier")
    before = trained_names(model)
    with pytest.raises(PlanError) as caught:
        plan.apply(model)
    assert str(caught.value) == (
        "1 parameters lie outside the plan's model (score.weight); say what becomes of them: "
        "apply(model, outside='trainable'), outside='frozen', or a mapping of names"
    )
    assert trained_names(model) == before


def test_outside_by_name_and_module() -> None:
    model, _ = wrapped_model("bert-masked", tie_word_embeddings=False)
    plan = example_plan("bert", BLOCKS)
    parts = {"cls.predictions.transform": "trainable", "cls.predictions.decoder": "frozen"}
    done = plan.apply(model, outside={**parts, "cls.predictions.bias": "frozen"})
    expected = {n for n, _ in model.named_parameters() if n.startswith("cls.predictions.transform")}
    assert {n for n, state in done.outside.items() if state == "trainable"} == expected
    assert {n for n in trained_names(model) if n.startswith("cls.")} == expected


@pytest.mark.parametrize(
    ("outside", "message"),
    [
        ({"cls.predictions.transform": "trainable"}, "nothing is said about cls.predictions.bias"),
        (
            {"score": "trainable"},
            "nothing around the plan's model is named score (there: cls.predictions.bias",
        ),
        ({"cls": "warm"}, "'warm' is no state for cls; choose 'frozen' or 'trainable'"),
        ("warm", "outside='warm': choose 'frozen', 'trainable' or a mapping of names"),
        (
            {"cls": "frozen", "cls.predictions.bias": "trainable"},
            "two things are said about cls.predictions.bias",
        ),
    ],
)
def test_words_about_the_outside_that_do_not_fit(outside: Any, message: str) -> None:
    model, _ = wrapped_model("bert-masked")
    before = trained_names(model)
    with pytest.raises(PlanError, match=re.escape(message)):
        example_plan("bert", BLOCKS).apply(model, outside=outside)
    assert trained_names(model) == before


def test_tensors_tied_outside_the_model_get_one_state() -> None:
    model, _ = wrapped_model("bert-masked")
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    parts = {"cls.predictions.transform": "frozen", "cls.predictions.bias": "trainable"}
    done = example_plan("bert", BLOCKS).apply(model, outside=parts)
    assert done.outside["cls.predictions.bias"] == "trainable"
    with pytest.raises(PlanError, match=r"two things are said about .*, which is the same tensor as cls"):
        example_plan("bert", BLOCKS).apply(model, outside={**parts, "cls.predictions.decoder.bias": "frozen"})


def test_a_tied_head_is_the_embedding_and_is_said_to_be() -> None:
    model, _ = wrapped_model("gpt2-lm")
    plan = example_plan("gpt2", BLOCKS)
    done = plan.apply(model)
    assert done.tied == {"lm_head.weight": "wte.weight"} and done.outside == {}
    assert not model.lm_head.weight.requires_grad
    free = example_plan("gpt2", BLOCKS, embeddings="trainable")
    free.apply(model, outside="frozen")
    assert model.lm_head.weight.requires_grad and model.transformer.wte.weight.requires_grad


def test_a_tied_head_cannot_differ_from_the_embedding() -> None:
    model, _ = wrapped_model("gpt2-lm")
    before = trained_names(model)
    with pytest.raises(PlanError) as caught:
        example_plan("gpt2", BLOCKS).apply(model, outside={"lm_head": "trainable"})
    assert str(caught.value) == (
        "lm_head.weight cannot be trainable: it is the same tensor as wte.weight (tied), which the plan keeps frozen"
    )
    assert trained_names(model) == before
    untied, _ = wrapped_model("gpt2-lm", tie_word_embeddings=False)
    example_plan("gpt2", BLOCKS).apply(untied, outside={"lm_head": "trainable"})
    assert untied.lm_head.weight.requires_grad and not untied.transformer.wte.weight.requires_grad


def test_tensors_tied_inside_the_model_cannot_be_split() -> None:
    plan = example_plan("gpt2", [0])
    model = bare_model("gpt2")
    model.h[5].ln_1.weight = model.h[0].ln_1.weight
    with pytest.raises(PlanError, match=r"one tensor in this model \(tied\), but the plan freezes only one"):
        plan.apply(model)


def test_a_compiled_model_and_checkpointed_blocks_are_seen_through() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plan = example_plan("llama", BLOCKS)
    model, _ = wrapped_model("llama-lm")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    compiled = torch.compile(model)
    done = plan.apply(compiled, outside="frozen")
    assert done.prefix == "model."
    seen = {n.replace("_checkpoint_wrapped_module.", "") for n in trained_names(model)}
    assert seen == {"model." + n for n in plan.trainable}


def test_distributed_data_parallel_is_seen_through(tmp_path: Path) -> None:
    plan = example_plan("gpt2", BLOCKS)
    model, _ = wrapped_model("gpt2-classifier")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        done = plan.apply(parallel, outside="trainable")
    finally:
        torch.distributed.destroy_process_group()
    assert done.prefix == "module.transformer."
    assert trained_names(model) == {"transformer." + n for n in plan.trainable} | {"score.weight"}


def test_fully_sharded_blocks_are_verified_by_their_shards(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plan = example_plan("gpt2", BLOCKS)
    model, _ = wrapped_model("gpt2-classifier")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        plan.apply(model, outside="trainable")
        mesh = init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        one_step(model, "gpt2", labels=torch.tensor([0, 1, 0, 1]))
        proof = plan.verify(model)
    finally:
        torch.distributed.destroy_process_group()
    assert proof.frozen == len(plan.frozen) and proof.changed == plan.trainable


def test_two_copies_of_the_model_need_a_prefix() -> None:
    plan = example_plan("gpt2", [1], n_blocks=2)
    pair = nn.ModuleDict({"student": bare_model("gpt2", 2), "teacher": bare_model("gpt2", 2)})
    with pytest.raises(PlanError, match=r"2 times, under 'student\.', 'teacher\.'; choose one with prefix="):
        plan.apply(pair, outside="frozen")
    plan.apply(pair, outside="frozen", prefix="student.")
    assert trained_names(pair) == {"student." + n for n in plan.trainable}


def test_a_module_the_head_class_leaves_out_must_be_named() -> None:
    table_model = build(transformers.BertModel, config("bert"))
    table = parameter_table(table_model)
    plan = FreezePlan.from_blocks(table, groups_of("bert", table), BLOCKS, model_id="bert")
    assert "pooler.dense.weight" in plan.frozen
    model, _ = wrapped_model("bert-masked")
    with pytest.raises(
        PlanError, match=r"lacks 2 parameters of the plan \(pooler.dense.weight, pooler.dense.bias\)"
    ):
        plan.apply(model, outside="frozen")
    done = plan.apply(model, outside="frozen", without=["pooler"])
    assert done.absent == ("pooler.dense.weight", "pooler.dense.bias")
    assert trained_names(model) == {"bert." + n for n in plan.trainable}
    one_step(model, "bert", labels=torch.zeros(4, 10, dtype=torch.long))
    assert plan.verify(model).frozen == len(plan.frozen) - 2
    with pytest.raises(PlanError, match="the plan has no such module"):
        plan.apply(model, outside="frozen", without=["poler"])
    assert plan.apply(build(transformers.BertModel, config("bert")), without=["pooler"]).absent == ()


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("n_blocks", [10, 22])
def test_another_number_of_blocks_is_one_line(n_blocks: int, wrap: bool, tmp_path: Path) -> None:
    plan = FreezePlan.load(example_plan("llama", BLOCKS, model_id="llama-7b").save(tmp_path / "plan.json"))
    configuration = config("llama", n_blocks)
    model = build(transformers.LlamaForCausalLM if wrap else transformers.LlamaModel, configuration)
    before = trained_names(model)
    with pytest.raises(PlanError) as caught:
        plan.apply(model, outside="frozen")
    assert str(caught.value) == (
        f"plan.json was made for 12 blocks (llama-7b); this model has {n_blocks}. "
        "Make one with: layerprobe freeze-search"
    )
    assert trained_names(model) == before


def test_check_of_a_bare_table_says_backbone() -> None:
    plan = example_plan("llama", BLOCKS, model_id="llama-7b")
    plan.check(parameter_table(bare_model("llama")))
    plan.check(parameter_table(bare_model("llama").bfloat16()))
    with pytest.raises(PlanError, match=r"12 blocks \(llama-7b\); this backbone has 22\. Make one with"):
        plan.check(parameter_table(bare_model("llama", 22)))
    with pytest.raises(PlanError, match="has none of its"):
        plan.check(parameter_table(bare_model("bert")))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match=r"whose wte\.weight is 40×16; this model has 40×32, and 148 of 148"):
        example_plan("gpt2", BLOCKS).apply(bare_model("gpt2", width=32))


def test_adapters_inside_blocks_are_refused() -> None:
    model = bare_model("gpt2")
    model.h[3].adapter = nn.Linear(16, 16)
    with pytest.raises(
        PlanError, match=r"has 2 that the plan does not name \(h.3.adapter.weight, h.3.adapter.bias\)"
    ):
        example_plan("gpt2", BLOCKS).apply(model, outside="frozen")


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_step_frozen_is_bit_identical_and_trainable_is_not(family: str) -> None:
    plan, model = example_plan(family, [2, 11], norms="trainable"), bare_model(family)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n in set(plan.frozen)}
    plan.apply(model, remember=False)
    before = plan.fingerprint(model)
    one_step(model, family)
    proof = plan.verify(model, before)
    assert proof.frozen == len(plan.frozen)
    assert set(proof.changed) | set(proof.unchanged) == set(plan.trainable)
    moved = dict(model.named_parameters())
    assert all(torch.equal(moved[n], value) for n, value in frozen.items())
    assert len(proof.changed) >= len(plan.trainable) - 4


def test_a_frozen_tensor_that_moves_by_one_bit_is_found() -> None:
    plan, model = example_plan("gpt2", BLOCKS), bare_model("gpt2")
    plan.apply(model)
    weight = model.h[7].mlp.c_fc.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
    with pytest.raises(PlanError, match=r"1 of 112 frozen tensors .*\(h\.7\.mlp\.c_fc\.weight\)"):
        plan.verify(model)


def test_a_sign_of_zero_is_a_bit() -> None:
    plan, model = example_plan("gpt2", BLOCKS), bare_model("gpt2")
    plan.apply(model)
    assert float(model.h[7].ln_1.bias[0]) == 0.0
    model.h[7].ln_1.bias.data[0] = -0.0
    with pytest.raises(PlanError, match=r"h\.7\.ln_1\.bias"):
        plan.verify(model)


def test_buffers_of_frozen_blocks_count_and_those_of_free_blocks_do_not() -> None:
    plan, model = example_plan("gpt2", BLOCKS), bare_model("gpt2")
    for block in model.h:
        block.register_buffer("running_mean", torch.zeros(3))
    before = plan.fingerprint(model)
    assert set(before.buffers) == {f"h.{i}.running_mean" for i in range(N_BLOCKS) if i not in BLOCKS}
    model.h[10].running_mean += 1
    assert plan.verify(model, before).buffers == N_BLOCKS - len(BLOCKS)
    model.h[9].running_mean += 1
    with pytest.raises(PlanError, match=r"\(h\.9\.running_mean\)"):
        plan.verify(model, before)


def test_trainable_parameters_that_never_got_a_gradient_are_reported() -> None:
    plan, model = example_plan("gpt2", [0], embeddings="trainable"), bare_model("gpt2")
    plan.apply(model)
    model(inputs_embeds=torch.randn(2, 5, 16)).last_hidden_state.square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    proof = plan.verify(model)
    assert proof.unchanged == ("wte.weight",)
    assert "12 of 13 trainable tensors changed (not: wte.weight)" in proof.summary()


def test_verify_needs_something_to_compare_with() -> None:
    plan, model = example_plan("gpt2", BLOCKS), bare_model("gpt2")
    with pytest.raises(PlanError, match="nothing to compare with"):
        plan.verify(model)
    example_plan("gpt2", [3]).apply(model)
    with pytest.raises(PlanError, match="nothing to compare with"):
        plan.verify(model)
    plan.apply(model)
    assert plan.verify(model).changed == ()
    with pytest.raises(PlanError, match="nothing to compare with"):
        plan.verify(bare_model("gpt2"))


def test_remembering_does_not_keep_the_model_alive() -> None:
    model = bare_model("gpt2")
    example_plan("gpt2", BLOCKS).apply(model)
    gc.collect()
    count = len(applied_states)
    del model
    gc.collect()
    assert len(applied_states) == count - 1


def test_a_fingerprint_survives_json_and_a_wrapper() -> None:
    plan, model = example_plan("gpt2", BLOCKS), bare_model("gpt2")
    before = Fingerprint.from_dict(json.loads(json.dumps(plan.fingerprint(model).to_dict())))
    assert before == plan.fingerprint(torch.compile(model))
    head, _ = wrapped_model("gpt2-classifier")
    head.transformer.load_state_dict(bare_model("gpt2").state_dict())
    assert plan.verify(head, before).changed == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_tells_dtype_shape_and_bytes_apart(dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert tensor_digest(value) == tensor_digest(value.t().contiguous().t())
    assert tensor_digest(value) != tensor_digest(value.reshape(3, 2))
    assert tensor_digest(value) != tensor_digest(value.flip(0))
    assert (
        len({tensor_digest(torch.zeros(2, dtype=d)) for d in (torch.float16, torch.bfloat16, torch.int16)})
        == 3
    )
    assert tensor_digest(torch.zeros((), dtype=dtype)) != tensor_digest(torch.zeros(0, dtype=dtype))


def test_a_digest_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(1000)
    whole = tensor_digest(value)
    monkeypatch.setattr("layerprobe.files._HASHED_AT_ONCE", 7)
    assert tensor_digest(value) == whole


def test_the_two_lines_for_the_hugging_face_trainer(tmp_path: Path) -> None:
    """The recipe of `FreezePlan`'s docstring, run: train, verify, and resume with the plan applied again."""
    example_plan("bert", [3, 11]).save(tmp_path / "plan.json")
    model, _ = wrapped_model("bert-tokens")
    data: list[dict[str, Any]] = [{"input_ids": [4, 5, 6, 7], "labels": [0, 1, 0, 1]} for _ in range(4)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip

    plan = FreezePlan.load(tmp_path / "plan.json")
    plan.apply(model, outside="trainable")
    transformers.Trainer(model=model, args=args, train_dataset=data).train()  # type: ignore[arg-type]
    proof = plan.verify(model)

    assert proof.frozen == len(plan.frozen) and len(proof.changed) == len(plan.trainable)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.BertForTokenClassification.from_pretrained(tmp_path / "saved")
    assert trained_names(again) == {n for n, _ in again.named_parameters()}
    plan.apply(again, outside="trainable")
    assert trained_names(again) == {"bert." + n for n in plan.trainable} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert plan.verify(again, plan.fingerprint(model)).changed == ()


def flags_of(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def int8_weights(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            codes = torch.zeros(module.weight.shape, dtype=torch.int8)
            module.weight = nn.Parameter(codes, requires_grad=False)


def offload(block: nn.Module) -> None:
    block.to("meta")


def zero_3(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)


def nest(block: nn.Module) -> None:
    weight = next(m for m in block.modules() if isinstance(m, nn.Linear))
    weight.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def under_inference(block: nn.Module) -> None:
    with torch.inference_mode():
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(torch.zeros(module.weight.shape), requires_grad=False)


@pytest.mark.parametrize("block", [0, 5])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (int8_weights, r"should be trainable hold int8 codes \(quantised\): .*Nothing was changed"),
        (offload, "meta device"),
        (zero_3, r"placeholders of DeepSpeed ZeRO-3 .*before deepspeed\.initialize"),
        (nest, "nested tensors"),
        (under_inference, "made under torch.inference_mode"),
    ],
)
def test_a_plan_is_applied_whole_or_not_at_all(change: Any, message: str, block: int) -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    change(model.layers[block])
    before = flags_of(model)
    if block == 5 and change in (int8_weights, under_inference):  # frozen: nothing has to train there
        plan.apply(model)
        assert trained_names(model) == set(plan.trainable)
        return
    with pytest.raises(PlanError, match=message):
        plan.apply(model)
    assert flags_of(model) == before


def test_offloaded_parameters_cannot_train_even_when_nothing_isremembered() -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    offload(model.layers[10])
    before = flags_of(model)
    with pytest.raises(PlanError, match=r"offloaded to disk or CPU: layers.10.*without offloading"):
        plan.apply(model, remember=False)
    assert flags_of(model) == before
    plan.apply(bare_model("llama").to("meta"), remember=False)


def test_a_flag_that_torch_refuses_puts_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    last = list(model.parameters())[-1]
    before = flags_of(model)

    def refuse(flag: bool) -> None:
        raise RuntimeError("no flags here\nmore")

    monkeypatch.setattr(last, "requires_grad_", refuse)
    with pytest.raises(PlanError, match=r"cannot be set: no flags here. Nothing was changed"):
        plan.apply(model)
    assert flags_of(model) == before


def test_a_sparse_tensor_cannot_beremembered_and_says_so() -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    linear = next(m for m in model.layers[5].modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())
    before = flags_of(model)
    with pytest.raises(PlanError, match=r"sparse_coo, float32\) cannot be read byte by byte"):
        plan.apply(model)
    assert flags_of(model) == before
    plan.apply(model, remember=False)
    assert trained_names(model) == set(plan.trainable)


def test_a_model_frozen_after_apply_is_told_from_one_that_trained() -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    peft = pytest.importorskip("peft", reason="the extra [dev] is not installed")
    plan.apply(model)
    peft.prepare_model_for_kbit_training(model)
    with pytest.raises(PlanError, match=rf"none of {len(plan.trainable)} trainable tensors changed.*kbit"):
        plan.verify(model)
    with torch.no_grad():
        model.get_parameter(plan.trainable[0]).add_(1)
    assert plan.verify(model).changed == (plan.trainable[0],)  # frozen once trained: nothing to complain of


def test_a_cast_after_apply_is_told_from_training() -> None:
    plan, model = example_plan("llama", BLOCKS), bare_model("llama")
    plan.apply(model)
    model.to(torch.bfloat16)
    with pytest.raises(PlanError, match="were float32 when the plan was applied and are bfloat16 now"):
        plan.verify(model)
