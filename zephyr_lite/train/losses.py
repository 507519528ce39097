"""Losses as pure functions of log-probabilities.

Notation: π the policy, π_ref the reference, x the prompt, y_w and y_l the chosen and the rejected response,
h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(logps: Tensor, step_targets: int) -> Tensor:
    """Negative log-likelihood of a micro-batch's targets, as its share of the step's mean.

    Args:
        logps: [N], of this micro-batch's targets.
        step_targets: how many targets the whole optimizer step has, over all its micro-batches and processes.
    """
    return -logps.sum() / step_targets


class Preference(NamedTuple):
    """Of a micro-batch of P pairs.

    Attributes:
        losses: [P].
        chosen_rewards, rejected_rewards: [P], β (log π − log π_ref), without a graph.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    sizes: Tensor,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
) -> Preference:
    """A DPO loss for each pair.

    Args:
        policy, reference: [P, 2] summed log-probabilities of chosen and rejected.
        sizes: [P, 2] how many tokens were summed.
        beta: β.
        loss_type:
            ``sigmoid``: −log σ(β h); Rafailov et al. 2023, arXiv 2305.18290, eq. 7. With label_smoothing ε the
                conservative mixture −(1 − ε) log σ(β h) − ε log σ(−β h) (E. Mitchell's note on DPO with noisy labels).
            ``robust``: (−(1 − ε) log σ(β h) + ε log σ(−β h)) / (1 − 2 ε), unbiased when a share ε of the pairs is
                swapped; Chowdhury et al. 2024, arXiv 2403.00409, eq. 12.
            ``hinge``: max(0, 1 − β h); SLiC, Zhao et al. 2023, arXiv 2305.10425, with DPO's reward.
            ``ipo``: (h̄ − 1 / (2 β))² with h̄ from log-probabilities averaged over each response's tokens, as TRL has it;
                Azar et al. 2023, arXiv 2310.12036, eq. 17, leaves the length to the reader.
            ``ipo_sum``: the same with the sums, as the paper writes it.
        label_smoothing: ε, below 0.5.
    """
    ratios = policy - reference
    h = ratios[:, 0] - ratios[:, 1]
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss_type == "robust":
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)) / (
            1 - 2 * label_smoothing
        )
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    elif loss_type == "ipo":
        mean = ratios / sizes
        losses = (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)).square()
    elif loss_type == "ipo_sum":
        losses = (h - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}")
    rewards = beta * ratios.detach()
    return Preference(losses, rewards[:, 0], rewards[:, 1])
