"""The exact step against dense autograd, and the dense objectives against their formulas."""

import copy
from collections.abc import Iterator
from typing import Any

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.sae import JumpReLUSAE, Writes, encode_sparse, new_sae, topk_relu
from saebench.sae.sparse import BLOCK_VALUES, Encoder, SparseCode, forget_scratch, places_of_largest, rowwise_topk
from saebench.train import Member, Spec
from saebench.train.gradients import exact_gradients, shared_gradients, together
from saebench.train.objectives import AUX_WEIGHT, Context, bandwidth, prefixes
from saebench.train.recipes import RECIPES
from saebench.train.shares import Share


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without company."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NOTHING_DEAD = torch.empty(0, dtype=torch.int64)


def random_sae(
    architecture: str, d_in: int, d_sae: int, k: int, seed: int, dtype: torch.dtype = torch.float64, **writes: Any
) -> Any:
    sae = new_sae(RECIPES[architecture].sae.architecture, d_in, d_sae, k=k, writes=Writes(**writes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if not sae.tied:
            sae.mean_D.copy_(torch.randn(d_in, generator=generator, dtype=torch.float64))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.abs_()
    return sae


def by_autograd(
    architecture: str, sae: Any, x: torch.Tensor, context: Context, y: torch.Tensor | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    sae.zero_grad()
    loss = RECIPES[architecture].objective(sae, x, context, x if y is None else y)
    loss.total.backward()
    gradients = {name: value.grad.clone() for name, value in sae.named_parameters() if value.grad is not None}
    return loss, gradients | {"W_enc": gradients["W_enc"].T}


def assert_equal_gradients(
    architecture: str, sae: Any, x: torch.Tensor, context: Context, tolerance: float,
    y: torch.Tensor | None = None, **how: Any,
):  # fmt: skip
    loss, want = by_autograd(architecture, sae, x, context, y)
    have = exact_gradients(RECIPES[architecture].gradients, sae, x, context, y, **how)
    assert have.of.keys() == want.keys()
    for name, value in want.items():
        scale = value.abs().max().item() or 1.0
        assert (have.of[name] - value).abs().max().item() <= tolerance * scale, name
    if RECIPES[architecture].unit_rows:
        along = (sae.W_dec * want["W_dec"]).sum(1)
        assert have.along_F is not None
        assert torch.allclose(have.along_F, along, rtol=tolerance, atol=tolerance * (along.abs().max().item() or 1.0))
    for name, value in loss._asdict().items():
        assert getattr(have.loss, name).item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name


SHAPES = {
    "n_rows": st.integers(1, 40),
    "d_in": st.integers(1, 12),
    "d_sae": st.integers(1, 70),
    "share_k": st.floats(0, 1),
    "n_dead": st.integers(0, 30),
    "seed": st.integers(0, 10_000),
}


@pytest.mark.parametrize("architecture", list(RECIPES))
@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_exact_gradients_equal_dense_autograd(
    architecture: str, n_rows: int, d_in: int, d_sae: int, share_k: float, n_dead: int, seed: int
) -> None:
    k = max(1, round(share_k * d_sae))
    sae = random_sae(architecture, d_in, d_sae, k, seed)
    x = torch.randn(n_rows + 1, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] = 0.0
    dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:n_dead].sort().values
    context = Context(
        torch.tensor(0.3, dtype=torch.float64), dead if RECIPES[architecture].takes_k else NOTHING_DEAD, k
    )
    assert_equal_gradients(architecture, sae, x, context, 1e-6)
    if not RECIPES[architecture].takes_k:
        assert_equal_gradients(architecture, sae, x, context, 1e-6, dense=True)


@pytest.mark.parametrize("kind", ["transcoder", "skip", "crosscoder", "crosslayer"])
@pytest.mark.parametrize("architecture", list(RECIPES))
@settings(max_examples=8, deadline=None)
@given(**SHAPES, d_out=st.integers(1, 12))
def test_so_do_those_of_what_reads_here_and_writes_there(
    architecture: str, kind: str, n_rows: int, d_in: int, d_out: int, d_sae: int, share_k: float, n_dead: int, seed: int
) -> None:
    k, takes_k = max(1, round(share_k * d_sae)), RECIPES[architecture].takes_k
    parts = {"crosscoder": (d_in, 2), "crosslayer": (d_out, 1, 3)}.get(kind, ())
    d_in += 2 if kind == "crosscoder" else 0
    d_out = sum(parts) or d_out
    writes = {"d_out": None if kind == "crosscoder" else d_out, "skip": kind in ("skip", "crosslayer"), "parts": parts}
    sae = random_sae(architecture, d_in, d_sae, k, seed, **writes)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows + 1, d_in, generator=generator, dtype=torch.float64)
    y = x if kind == "crosscoder" else torch.randn(n_rows + 1, d_out, generator=generator, dtype=torch.float64)
    dead = torch.randperm(d_sae, generator=generator)[: n_dead if takes_k else 0].sort().values
    context = Context(torch.tensor(0.3, dtype=torch.float64), dead, k)
    assert_equal_gradients(architecture, sae, x, context, 1e-6, y)
    if not takes_k:
        assert_equal_gradients(architecture, sae, x, context, 1e-6, y, dense=True)


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_a_decoder_row_of_zeros_is_no_nan(architecture: str) -> None:
    sae = random_sae(architecture, 8, 24, 6, 3)
    with torch.no_grad():
        sae.W_dec[[2, 5]] = 0.0
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equal_gradients(architecture, sae, x, Context(torch.tensor(0.3, dtype=torch.float64), NOTHING_DEAD, 6), 1e-6)


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_exact_gradients_in_float32(architecture: str) -> None:
    sae = random_sae(architecture, 48, 640, 20, 3, torch.float32)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc /= sae.W_enc.norm(dim=0, keepdim=True)
    x = torch.randn(500, 48, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(0, 200 if RECIPES[architecture].takes_k else 0, dtype=torch.int64)
    context = Context(torch.tensor(0.1), dead, 20)
    assert_equal_gradients(architecture, sae, x, context, 1e-4)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu", "topk", "batchtopk"])
def test_blocks_of_rows_change_nothing(architecture: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_VALUES, "cpu", 7 * 40)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sae = random_sae(architecture, 6, 40, 4, 5)
    context = Context(torch.tensor(0.3, dtype=torch.float64), NOTHING_DEAD, 4)
    assert_equal_gradients(architecture, sae, x, context, 1e-6, dense=dense)


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_latents_that_never_fire_and_no_active_latent_at_all(architecture: str) -> None:
    x = torch.randn(9, 5, dtype=torch.float64)
    sae = random_sae(architecture, 5, 12, 3, 1)
    bias = "b_gate" if architecture == "gated" else "b_enc"
    context = Context(torch.tensor(0.3, dtype=torch.float64), NOTHING_DEAD, 3)
    with torch.no_grad():
        getattr(sae, bias)[2] = -1e3
    assert_equal_gradients(architecture, sae, x, context, 1e-6)
    assert exact_gradients(RECIPES[architecture].gradients, sae, x, context).of["W_dec"][2].abs().max() == 0
    with torch.no_grad():
        getattr(sae, bias).fill_(-1e3)
    assert_equal_gradients(architecture, sae, x, context, 1e-6)


def test_ties_choose_k_and_train_only_what_was_chosen() -> None:
    sae = random_sae("topk", 4, 6, 2, 0)
    with torch.no_grad():
        sae.W_enc[:] = sae.W_enc[:, :1]  # all latents alike
        sae.b_enc[:] = 5.0
    x = torch.randn(8, 4, dtype=torch.float64) / 10
    gradients = exact_gradients(RECIPES["topk"].gradients, sae, x, Context(torch.tensor(0.0), NOTHING_DEAD, 2))
    assert gradients.fires_F is not None
    assert gradients.fires_F.sum() == 16
    assert ((gradients.of["W_dec"].abs().sum(1) > 0) == (gradients.fires_F > 0)).all()


@pytest.mark.parametrize("guess", [0.0, 0.4, 1e6])
def test_the_guess_of_batchtopk_changes_nothing(guess: float) -> None:
    sae = random_sae("batchtopk", 6, 50, 4, 2)
    x = torch.randn(40, 6, dtype=torch.float64)
    context = Context(torch.tensor(0.0, dtype=torch.float64), NOTHING_DEAD, 4)
    assert_equal_gradients("batchtopk", sae, x, context, 1e-6, guess=guess)


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_fast_and_reference_losses_agree_over_200_steps(architecture: str) -> None:
    """The reference: the same loop with autograd's gradients."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(60, 16, generator=generator)
    recipe = RECIPES[architecture]
    level: dict[str, Any] = {"k": 4} if recipe.takes_k else {"l1": 0.3}
    spec = Spec(name=architecture, architecture=architecture, d_sae=96, lr=2e-3, seed=0, **level)
    fast, slow = (Member(spec, torch.zeros(16), 20, 200, "cpu") for _ in range(2))
    curves: list[tuple[float, float]] = []
    for step in range(200):
        codes = torch.rand(128, 60, generator=generator) * (torch.rand(128, 60, generator=generator) < 0.05)
        x = codes @ directions + 0.01 * torch.randn(128, 16, generator=generator)
        reference_step(slow, x, step)
        fast.step(x, step)
        curves.append((fast.log_line(step)["loss"], slow.log_line(step)["loss"]))
    for one, other in curves:
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)
    assert sum(one for one, _ in curves[-20:]) < 0.7 * sum(one for one, _ in curves[:20])


def reference_step(member: Member, x: torch.Tensor, step: int) -> None:
    """`Member.step` with the gradients replaced by autograd's."""
    import saebench.train.member as module

    exact = module.shared_gradients

    def dense(rule: Any, sae: Any, x: torch.Tensor, context: Context, y: Any, **how: Any) -> Any:
        have = yield from exact(rule, sae, x, context, y, **how)
        with torch.enable_grad():
            _, have.of = by_autograd(member.spec.architecture, sae, x, context, y)
        return have

    module.shared_gradients = dense
    try:
        member.step(x, step)
    finally:
        module.shared_gradients = exact


@pytest.mark.parametrize("architecture", list(RECIPES))
@settings(max_examples=8, deadline=None)
@given(n_rows=st.integers(2, 40), d_sae=st.integers(1, 70), share_k=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_gradients_of_those_that_write_to_the_same_hooks_equal_dense_autograd(
    architecture: str, n_rows: int, d_sae: int, share_k: float, seed: int
) -> None:
    """Of the dense objective of each, asked for what the others do not write."""
    recipe, k, widths = RECIPES[architecture], max(1, round(share_k * d_sae)), {"a": 5, "b": 3, "c": 4}
    if architecture == "topk":
        k = min(k, d_sae)
    writes = [("a", "b", "c"), ("b", "c"), ("c",)]
    generator = torch.Generator().manual_seed(seed)
    target = {hook: torch.randn(n_rows, width, generator=generator).double() for hook, width in widths.items()}
    saes, given_, context = [], [], Context(torch.tensor(0.3, dtype=torch.float64), NOTHING_DEAD, k)
    for n, hooks in enumerate(writes):
        sizes = tuple(widths[hook] for hook in hooks)
        saes.append(random_sae(architecture, 6, d_sae, k, seed + n, d_out=sum(sizes), parts=sizes, skip=n == 1))
        x = torch.randn(n_rows, 6, generator=generator).double()
        y = torch.cat([target[hook] if hook == hooks[0] else torch.zeros_like(target[hook]) for hook in hooks], 1)
        given_.append((x, y))
    n_hooks = range(len(writes))
    variances = [sum(Share().variance_of(target[hook]) for hook in hooks) for hooks in writes]
    found: dict[int, Any] = {}

    def run(n: int) -> Any:
        x, y = given_[n]
        found[n] = yield from shared_gradients(recipe.gradients, saes[n], x, context, y, variance=variances[n])

    with torch.no_grad():
        together([run(n) for n in n_hooks], writes, widths)

    def written(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        sums = {hook: torch.zeros_like(rows) for hook, rows in target.items()}
        for hooks, value in zip(writes, values, strict=True):
            for hook, part in zip(hooks, value.split([widths[hook] for hook in hooks], 1), strict=True):
                sums[hook] = sums[hook] + part
        return sums

    if architecture in ("topk", "batchtopk"):  # the sum itself, by autograd
        for n in n_hooks:
            for sae in saes:
                sae.zero_grad()
            outputs = []
            for sae, (x, _) in zip(saes, given_, strict=True):
                pre = sae.project(x) + sae.b_enc
                acts = (
                    topk_relu(pre, k)
                    if architecture == "topk"
                    else topk_relu(pre.flatten()[None], k * n_rows).view(pre.shape)
                )
                outputs.append(acts @ sae.W_dec + sae.base(x))
            sums = written(outputs)
            error = sum((sums[hook] - target[hook]).pow(2).sum() for hook in writes[n])
            (error / n_rows / variances[n]).backward()
            for name, want in saes[n].named_parameters():
                if name == "threshold":
                    continue
                want = want.grad.T if name == "W_enc" else want.grad
                assert torch.allclose(found[n].of[name], want, rtol=1e-6, atol=1e-9 * float(want.abs().max() + 1)), name
    for n in n_hooks:
        assert found[n].error_B.shape == (n_rows,)


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_an_sae_is_trained_to_the_bits_of_before_there_were_transcoders(architecture: str) -> None:
    if golden.fingerprint() != golden.RECORDED_ON:
        pytest.skip("this machine rounds otherwise than the one on which the bits were recorded")
    assert golden.trained(architecture) == golden.RECORDED[architecture]


# -------------------------------------------------------------------------------------- selection


@settings(max_examples=80, deadline=None)
@given(n_rows=st.integers(1, 20), groups=st.integers(1, 40), k=st.integers(1, 24), seed=st.integers(0, 999))
@pytest.mark.parametrize("ties", [False, True])
def test_two_stages_choose_what_one_does(ties: bool, n_rows: int, groups: int, k: int, seed: int) -> None:
    pre = torch.randn(n_rows, 16 * groups, generator=torch.Generator().manual_seed(seed))
    pre = pre.round(decimals=1) if ties else pre
    k = min(k, 16 * groups)
    values, latents = rowwise_topk(pre, k)
    assert torch.equal(values.sort(1).values, pre.topk(k, 1).values.sort(1).values)
    assert torch.equal(pre.gather(1, latents), values)
    assert all(len(set(row)) == k for row in latents.tolist())


@pytest.mark.parametrize("threads", [1, 4])
def test_the_largest_of_a_row_are_found_beside_equal_ones_and_what_is_no_number(threads: int) -> None:
    rows = torch.tensor([[1.0, 2, 3, 4], [5, 4, 5, 1], [7, 7, 7, 0], [0, torch.nan, 3, 2]])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert [set(places) for places in places_of_largest(rows[:2], 2).tolist()] == [{2, 3}, {0, 2}]
        # The third row has one more of its least value, and the last one fewer: eight in all.
        found = places_of_largest(rows, 2).tolist()
        assert [set(places) for places in found[:2]] == [{2, 3}, {0, 2}]
        assert set(found[2]) < {0, 1, 2}
        assert set(found[3]) == {1, 2}  # as PyTorch has it, nan is above all
        assert [len(set(places)) for places in found] == [2, 2, 2, 2]
        assert places_of_largest(rows[:2], 4, ascending=True).tolist() == [[0, 1, 2, 3]] * 2
        assert places_of_largest(rows[:2], 2, ascending=True).tolist() == [[2, 3], [0, 2]]
        assert places_of_largest(rows[3:], 2, ascending=True).tolist() == [[1, 2]]
        # One that is no number, and one more of the least that is one: k at or above it all the same.
        assert 0 in places_of_largest(torch.tensor([[torch.nan, 3, 2, 2, 1, 0]]), 3)[0]
        assert [set(places) for places in places_of_largest(rows[:2].bfloat16(), 2).tolist()] == [{2, 3}, {0, 2}]
    finally:
        torch.set_num_threads(before)


def test_what_was_encoded_in_inference_mode_can_be_trained_on_after() -> None:
    """The memory that a thread keeps is no tensor of whatever mode it was first wanted in."""
    sae, x_RD = new_sae("topk", 16, 48, k=4), torch.randn(8, 16)
    forget_scratch()
    with torch.inference_mode():
        inside = encode_sparse(sae, x_RD)[1]
    assert torch.equal(encode_sparse(sae, x_RD)[1], inside)


def test_in_bfloat16_on_a_cpu_an_sae_encodes_as_near_as_that_is() -> None:
    sae, x_RD = new_sae("relu", 16, 48), torch.randn(8, 16)
    found = encode_sparse(copy.deepcopy(sae).bfloat16(), x_RD.bfloat16())[1].sum()
    assert float(found) == pytest.approx(float(encode_sparse(sae, x_RD)[1].sum()), rel=0.02)


def test_batch_topk_takes_the_largest_of_all_rows_and_nothing_negative() -> None:
    z = torch.tensor([[3.0], [1.0], [-1.0]])
    code, values = Encoder(z, torch.tensor([[1.0, -2.0, 0.5]]), torch.zeros(3)).batch_topk(1)
    # pre-activations: 3 -6 1.5 | 1 -2 .5 | -1 2 -.5
    assert values.tolist() == [3.0, 1.5, 2.0]
    assert code.latents.tolist() == [0, 2, 1]
    assert code.offsets.tolist() == [0, 2, 2, 3]
    assert code.rows.tolist() == [0, 0, 2]
    code, values = Encoder(z, torch.tensor([[1.0, -2.0, 0.5]]), torch.zeros(3)).batch_topk(3)
    assert len(values) == 5  # all that is positive


def test_a_code_split_at_latents_has_a_row_for_each_part() -> None:
    code = SparseCode(torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([0, 2, 5, 4], dtype=torch.int32), 6)
    assert code.split([0, 2, 4]).offsets.tolist() == [0, 1, 2, 3, 3, 3, 4]
    assert code.by_latent[0].tolist() == [0, 1, 1, 2, 2, 3, 4]
    assert code.by_latent[1].tolist() == [0, 0, 1, 0]


def test_prefixes_of_matryoshka() -> None:
    assert prefixes(4096) == [128, 384, 896, 1920, 4096]
    assert prefixes(8) == [1, 2, 4, 8]
    assert prefixes(1) == [1]


# ------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_objectives_equal_their_formulas(architecture: str) -> None:
    sae = random_sae(architecture, 5, 12, 3, 0)
    x = torch.randn(30, 5, dtype=torch.float64)
    dead = torch.tensor([2, 7, 11])
    context = Context(torch.tensor(0.3, dtype=torch.float64), dead, 3)
    loss = RECIPES[architecture].objective(sae, x, context, x)
    pre = (x - sae.b_dec) @ sae.W_enc
    if architecture == "gated":
        gate = torch.relu(pre + sae.b_gate)
        acts = (gate > 0) * torch.relu(pre * sae.r_mag.exp() + sae.b_mag)
    elif architecture in ("batchtopk", "matryoshka"):
        pre = pre + sae.b_enc
        acts = torch.relu(pre) * (pre >= pre.flatten().sort().values[-90])
    else:
        acts, pre = sae(x).acts, pre + sae.b_enc
    mse = ((x - acts @ sae.W_dec - sae.b_dec) ** 2).sum(1).mean()
    if architecture == "relu":
        want = mse + 0.3 * (acts * sae.W_dec.norm(dim=1)).sum(1).mean()
    elif architecture == "jumprelu":
        want = mse + 0.3 * (acts > 0).sum(1).double().mean()
    elif architecture == "gated":
        want = mse + 0.3 * gate.sum(1).mean() + ((x - gate @ sae.W_dec - sae.b_dec) ** 2).sum(1).mean()
    else:
        left_over = x - acts @ sae.W_dec - sae.b_dec
        aux = ((left_over - topk_relu(pre[:, dead], 2) @ sae.W_dec[dead]) ** 2).sum(1).mean()  # min(D // 2, dead) = 2
        if architecture == "matryoshka":
            assert prefixes(12) == [1, 3, 6, 12]
            mse = sum(((x - acts[:, :m] @ sae.W_dec[:m] - sae.b_dec) ** 2).sum(1).mean() for m in (1, 3, 6, 12)) / 4
        want = (mse + AUX_WEIGHT * aux) / x.var(0, correction=0).sum()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-9)


def test_auxk_trains_dead_latents_only_and_their_encoder_too() -> None:
    sae = random_sae("topk", 5, 12, 3, 0)
    x = torch.randn(30, 5, dtype=torch.float64)
    dead = torch.tensor([2, 7])
    RECIPES["topk"].objective(sae, x, Context(torch.tensor(0.0), dead, 3), x).auxiliary.backward()
    for gradient in (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad[:, None]):
        moved = gradient.abs().sum(1) > 0
        assert moved.nonzero()[:, 0].tolist() == dead.tolist()
    # the residual is a target, not something to train; b_dec has no part in it but through the pre-bias
    assert torch.allclose(sae.b_dec.grad, -(sae.b_enc.grad @ sae.W_enc.T))


def test_gated_auxiliary_loss_does_not_reach_the_decoder() -> None:
    sae = random_sae("gated", 5, 12, 3, 0)
    x = torch.randn(30, 5, dtype=torch.float64)
    RECIPES["gated"].objective(sae, x, Context(torch.tensor(0.0), NOTHING_DEAD), x).auxiliary.backward()
    assert sae.W_dec.grad is None
    assert sae.b_gate.grad.abs().sum() > 0
    assert sae.r_mag.grad is None or sae.r_mag.grad.abs().sum() == 0


def test_straight_through_estimates_of_jumprelu() -> None:
    """One latent, unit weights: one row at θ within ε/2 below, one above, one beyond."""
    sae = new_sae("jumprelu", 1, 1).double()
    epsilon = bandwidth(1)
    with torch.no_grad():
        sae.W_enc[:], sae.W_dec[:] = 1.0, 1.0
        sae.threshold[:] = 2.0
    x = torch.tensor([[2.0 - epsilon / 4], [2.0 + epsilon / 4], [3.0]], dtype=torch.float64)
    loss = RECIPES["jumprelu"].objective(sae, x, Context(torch.tensor(0.5), NOTHING_DEAD), x)
    assert loss.sparsity.item() == pytest.approx(2 / 3)
    loss.total.backward()
    # dmse/df is -2x/3 where silent and 0 where x̂ = x; the penalty's is -λ/(3ε) for each of the two rows near θ
    want = -(-2 * (2 - epsilon / 4) / 3) * 2 / epsilon - 2 * 0.5 / (3 * epsilon)
    assert sae.threshold.grad.item() == pytest.approx(want, rel=1e-6)


def test_recipes_differ_where_the_papers_do() -> None:
    betas = {}
    for name in RECIPES:
        level: dict[str, Any] = {"k": 2} if RECIPES[name].takes_k else {"l1": 0.1}
        member = Member(
            Spec(name="s", architecture=name, d_sae=8, lr=1e-3, seed=0, **level), torch.zeros(5), 5, 9, "cpu"
        )
        betas[name] = member.optimizer.param_groups[0]["betas"][0]
    assert betas == {"relu": 0.9, "topk": 0.9, "batchtopk": 0.9, "matryoshka": 0.9, "gated": 0.0, "jumprelu": 0.0}


@pytest.mark.parametrize("architecture", [name for name, recipe in RECIPES.items() if recipe.unit_rows])
def test_unit_rows_take_no_gradient_along_themselves(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    level: dict[str, Any] = {"k": 2} if RECIPES[architecture].takes_k else {"l1": 0.1}
    spec = Spec(name="s", architecture=architecture, d_sae=8, lr=1e-3, seed=0, **level)
    member = Member(spec, torch.zeros(5), 1, 100, "cpu")
    seen: list[torch.Tensor] = []
    update = Member._update

    def look(self: Member, gradients: Any, *rest: Any) -> None:
        seen.append((gradients.of["W_dec"] * self.sae.W_dec).sum(1).abs().max() / gradients.of["W_dec"].abs().max())
        update(self, gradients, *rest)

    monkeypatch.setattr(Member, "_update", look)
    for step in range(5):  # dead latents from the second step on
        member.step(torch.randn(20, 5), step)
    assert max(seen).item() < 1e-5


def test_a_step_that_is_not_finite_changes_no_weight() -> None:
    spec = Spec(name="s", architecture="topk", d_sae=8, k=2, lr=1e-3, seed=0)
    member = Member(spec, torch.zeros(5), 5, 100, "cpu")
    x = torch.randn(20, 5)
    member.step(x, 0)
    before = {name: value.clone() for name, value in member.sae.state_dict().items()}
    x[3, 2] = torch.inf
    member.step(x, 1)
    assert member.diverged == 1
    assert all(torch.equal(before[name], value) for name, value in member.sae.state_dict().items())


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_room_for_active_pairs_changes_nothing_where_it_is_enough(architecture: str) -> None:
    sae = random_sae(architecture, 6, 40, 4, 5)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    context = Context(torch.tensor(0.3, dtype=torch.float64), NOTHING_DEAD, None)
    assert_equal_gradients(architecture, sae, x, context, 1e-6, most=1201)
    rule = RECIPES[architecture].gradients
    pairs = exact_gradients(rule, sae, x, context).fullest
    for room, enough in ((1201, True), (int(pairs) + 1, True), (int(pairs), False), (7, False)):
        assert (int(exact_gradients(rule, sae, x, context, most=room).fullest) < room) == enough


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_a_step_without_room_for_its_pairs_teaches_nothing_and_is_counted(architecture: str) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    spec = Spec(name="m", architecture=architecture, d_sae=128, target_l0=4.0, lr=1e-3, seed=0)
    member = Member(spec, torch.zeros(16), 16, 100, "cpu")  # each step adds to the pool of resampling
    for step in range(20):
        member.step(x, step)
    before = {name: value.clone() for name, value in member.state().items()}
    member._look = lambda: None  # as between the looks of a GPU
    member._dense, member._most = False, 10
    for step in range(20, 25):
        member.step(x, step)
    after = member.state()
    assert not any(
        name for name, value in before.items() if not name.startswith("pool") and not torch.equal(value, after[name])
    )
    assert torch.equal(member.pool[: len(before["pool"])], before["pool"])
    assert (member.pool_keys[len(before["pool"]) :] < before["pool_keys"].min()).all()  # where rows have no loss
    assert member.diverged is None
    member._most = 64 * 128 + 1
    member.step(x, 25)
    assert not torch.equal(member.sae.W_dec, before["sae.W_dec"])
    assert member.log_line(25)["steps_left_out"] == 5
    member.step(x, 26)
    assert "steps_left_out" not in member.log_line(26)


@pytest.mark.parametrize(("n_rows", "d_sae", "k"), [(40, 320, 3), (1, 64, 1), (30, 37, 5), (4, 8, 8)])
def test_the_search_that_waits_for_no_gpu_finds_what_the_other_does(
    n_rows: int, d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    z, weights = torch.randn(n_rows, 6, generator=generator), torch.randn(6, d_sae, generator=generator)
    encoder = Encoder(z, weights, torch.zeros(d_sae))
    code, values = encoder.batch_topk(k)
    for block in (2**25, 11 * d_sae):
        monkeypatch.setitem(BLOCK_VALUES, "cpu", block)
        found, largest = encoder._largest(k * n_rows)
        positive = largest > 0  # where fewer are, the rest is inert
        assert torch.equal(largest[positive], values)
        assert torch.equal(found.latents[positive], code.latents)
        assert torch.equal(found.rows[positive], code.rows)


def test_the_first_selection_of_batchtopk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    z, weights = torch.randn(512, 16, generator=generator), torch.randn(16, 4096, generator=generator)
    found: list[int] = []
    above = Encoder.above

    def counted(self: Encoder, threshold: float = 0.0, most: int | None = None) -> Any:
        result = above(self, threshold, most)
        found.append(len(result[1]))
        return result

    monkeypatch.setattr(Encoder, "above", counted)
    _, values = Encoder(z, weights, torch.zeros(4096)).batch_topk(8)
    assert len(values) == 8 * 512
    assert max(found) < 4 * 8 * 512  # half of all 2 million are positive
    assert values.min() == (z @ weights).flatten().topk(8 * 512).values.min()
