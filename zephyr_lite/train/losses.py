"""Losses as pure functions of log-probabilities.

Notation: π the policy, π_ref the reference, x the prompt, y_w and y_l the chosen and the rejected response, |y| its supervised
tokens; r = log π(y|x) − log π_ref(y|x), p = log π(y|x) / |y|, h = r_w − r_l, h̄ = r_w / |y_w| − r_l / |y_l|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.schema import REFERENCE_FREE, RunConfig

# ORPO's log-odds of a response whose tokens are almost certain would be infinite
CERTAIN = -1e-4


def sft_loss(logps: Tensor, step_targets: int) -> Tensor:
    """Negative log-likelihood of a micro-batch's targets, as its share of the step's mean.

    Args:
        logps: [N], of this micro-batch's targets.
        step_targets: how many targets the whole optimizer step has, over all its micro-batches and processes.
    """
    return -logps.sum() / step_targets


def kto_loss(
    policy: Tensor, reference: Tensor, z0: float, *, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """[P, 2] losses of desirable and undesirable answers, λ_D (1 − σ(β (r − z0))) and λ_U (1 − σ(β (z0 − r))) with
    r = log π(y|x) − log π_ref(y|x); Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7.

    Args:
        policy, reference: [P, 2] summed log-probabilities of desirable and undesirable answers.
        z0: an estimate of the policy's divergence from the reference.
        beta, weights: β, (λ_D, λ_U).
    """
    above = beta * (policy - reference - z0)
    return torch.stack([weights[0] * torch.sigmoid(-above[:, 0]), weights[1] * torch.sigmoid(above[:, 1])], 1)


class Preference(NamedTuple):
    """Of a micro-batch of P pairs.

    Attributes:
        losses: [P].
        chosen_rewards, rejected_rewards: [P], β r, or β p without a reference; no graph.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss(
    policy: Tensor,
    reference: Tensor | None,
    sizes: Tensor,
    *,
    beta: float,
    loss_type: str | Mapping[str, float],
    label_smoothing: float = 0.0,
    simpo_gamma: float = 1.0,
    chosen_size: float | None = None,
) -> Preference:
    """A loss for each pair, or the weighted sum of several.

    Args:
        policy, reference: [P, 2] summed log-probabilities of chosen and rejected; without a reference None.
        sizes: [P, 2] how many tokens were summed.
        beta, label_smoothing, simpo_gamma: β, ε (below 0.5), γ.
        loss_type: one of these, or several with their weights.
            ``sigmoid``: −log σ(β h); DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7. With ε the conservative mixture
                −(1 − ε) log σ(β h) − ε log σ(−β h) (E. Mitchell's note on DPO with noisy labels).
            ``robust``: (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2 ε), unbiased when a share ε of the pairs is
                swapped; Chowdhury et al. 2024, arXiv 2403.00409, eq. 12.
            ``sigmoid_norm``: −log σ(β h̄); DPO per token, Lambert et al. 2024, arXiv 2411.15124 (Tülu 3).
            ``hinge``: max(0, 1 − β h); SLiC, Zhao et al. 2023, arXiv 2305.10425, with DPO's reward.
            ``ipo``: (h̄ − 1 / (2 β))², per token, as TRL has it; Azar et al. 2023, arXiv 2310.12036, eq. 17, leaves the
                length to the reader. ``ipo_sum``: (h − 1 / (2 β))², as the paper writes it.
            ``apo_zero``: 1 − σ(β r_w) + σ(β r_l), and ``apo_down``: σ(β r_w) + 1 − σ(β h); D'Oosterlinck et al. 2024,
                arXiv 2408.06266, eq. 7 and 8.
            ``bco_pair``: −log σ(β r_w) − log σ(−β r_l); Jung et al. 2024, arXiv 2404.04656, without its running mean.
            ``sft``: −log π(y_w|x), over ``chosen_size``: its mean is that over tokens. The second term of RPO, Pang et al.
                2024, arXiv 2404.19733. No reference.
            ``simpo``: −log σ(β (p_w − p_l) − γ); Meng et al. 2024, arXiv 2405.14734, eq. 6. No reference.
            ``orpo``: the loss ``sft`` − β log σ(o_w − o_l), the log-odds o = p − log(1 − exp p) of
                p ≤ −1e-4; Hong et al. 2024,
                arXiv 2403.07691, eq. 6 and 7, where β is λ. No reference.
        chosen_size: tokens of a chosen response, a mean over the whole optimizer step; None: over these pairs.
    """
    ratios = policy / sizes if reference is None else policy - reference
    chosen, rejected = (beta * ratios).unbind(1)
    h = _gap(ratios)
    chosen_size = sizes[:, 0].double().mean().item() if chosen_size is None else chosen_size

    def loss(name: str) -> Tensor:
        match name:
            case "sigmoid":
                return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
            case "robust":
                swapped = label_smoothing * F.logsigmoid(-beta * h)
                return (-(1 - label_smoothing) * F.logsigmoid(beta * h) + swapped) / (1 - 2 * label_smoothing)
            case "sigmoid_norm":
                return -F.logsigmoid(beta * _gap(ratios / sizes))
            case "hinge":
                return torch.relu(1 - beta * h)
            case "ipo":
                return (_gap(ratios / sizes) - 1 / (2 * beta)).square()
            case "ipo_sum":
                return (h - 1 / (2 * beta)).square()
            case "apo_zero":
                return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
            case "apo_down":
                return torch.sigmoid(chosen) + 1 - torch.sigmoid(beta * h)
            case "bco_pair":
                return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
            case "sft":
                return -policy[:, 0] / chosen_size
            case "simpo":
                return -F.logsigmoid(beta * _gap(policy / sizes) - simpo_gamma)
            case "orpo":
                mean = (policy / sizes).clamp(max=CERTAIN)
                return loss("sft") - beta * F.logsigmoid(_gap(mean - torch.log(-torch.expm1(mean))))
        raise ValueError(f"unknown loss_type {name!r}")

    weights = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    first, *others = (weight * loss(name) for name, weight in weights.items())
    return Preference(sum(others, first), chosen.detach(), rejected.detach())


def _gap(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


def loss_of(config: RunConfig, policy: Tensor, reference: Tensor | None, sizes: Tensor, size: float) -> Preference:
    """``preference_loss`` with a configuration's losses and parameters; ``size``: its ``chosen_size``."""
    return preference_loss(
        policy,
        reference,
        sizes,
        beta=config.beta,
        loss_type=config.losses,
        label_smoothing=config.label_smoothing,
        simpo_gamma=config.simpo_gamma,
        chosen_size=size,
    )


def initial_loss(config: RunConfig) -> tuple[float, str] | None:
    """The loss before the first update, where policy and reference are equal, and its name in messages; None if it depends on
    the log-probabilities themselves."""
    if config.losses.keys() & REFERENCE_FREE:
        return None
    if config.loss_type == "kto":
        half = config.desirable_weight / 2
        return (half, f"{half:g}") if config.undesirable_weight == config.desirable_weight else None
    equal = torch.zeros(1, 2, dtype=torch.float64)
    value = loss_of(config, equal, equal, equal + 1, 1.0).losses.item()
    return value, "ln 2" if math.isclose(value, math.log(2)) else f"{value:.4g}"
