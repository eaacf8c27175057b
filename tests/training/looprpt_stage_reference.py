"""The terms of LoopRPT in NumPy that do not depend on drawn exits, from two plain passes of a model."""

import numpy as np


def expected_terms(forward, model, params, teacher, batch, config):
    """Returns the terms of a batch if noise has no effect: every rollout has the scores of the plain pass.

    Args:
      forward: runs the model on parameters and tokens.
      model: the configuration of the model.
      params: the parameters of the student.
      teacher: those of the teacher.
      batch: the batch, in NumPy.
      config: the settings of LoopRPT.
    """
    log_probs, gates, _ = _scores(forward, params, batch)
    teacher_log_probs, teacher_gates, entropy = _scores(forward, teacher, batch)
    hard = _hard(entropy, batch, config.hard_share)
    pdf, teacher_pdf = _exit_pdf(gates), _exit_pdf(teacher_gates)

    reached = np.cumsum(teacher_pdf, axis=0) >= config.exit_threshold
    reached[-1] = True
    reference = 1 + reached.argmax(axis=0)
    baseline = np.take_along_axis(teacher_log_probs, reference[None] - 1, axis=0)
    difficulty = np.clip(entropy / np.log(model.vocab_size), 0, 1)
    price = config.penalty * (1 + config.penalty_scale * (1 - difficulty))
    loops = np.arange(1, len(gates) + 1)[:, None, None]
    rewards = log_probs - baseline - price * (loops - reference)
    spread = rewards.std(axis=0, ddof=1) + 1e-8
    weights = pdf * (1 + np.maximum((rewards - rewards.mean(axis=0)) / spread, 0))

    gap = np.clip(teacher_log_probs - log_probs, -20, 20)
    divergence = np.minimum(np.exp(gap) - gap - 1, 10).sum(axis=0)
    mask = batch.loss_mask
    return {
        "hard_tokens": hard.sum(),
        "reference_loop": (hard * reference).sum() / hard.sum(),
        "representation_loss": -(hard * weights * log_probs).sum() / hard.sum(),
        "exit_entropy": -(hard * (pdf * np.log(pdf)).sum(axis=0)).sum() / hard.sum(),
        "kl": (hard * divergence).sum() / hard.sum(),
        "loss_per_loop": -(mask * log_probs).sum(axis=(1, 2)) / mask.sum(),
    }


def _scores(forward, params, batch):
    """Returns log-probabilities of the targets, gates, and the entropies of the last loop, in float64."""
    output = forward({"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    logits = np.asarray(output.hidden, np.float64) @ np.asarray(params["head"], np.float64)
    log_pdf = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_pdf, batch.targets[None, ..., None], axis=-1)[..., 0]
    return chosen, np.asarray(output.gate_logits, np.float64), -(np.exp(log_pdf[-1]) * log_pdf[-1]).sum(axis=-1)


def _exit_pdf(gates):
    """Returns the exit distribution as a product of probabilities."""
    leave = 1 / (1 + np.exp(-gates))
    leave[-1] = 1
    return leave * np.concatenate([np.ones_like(leave[:1]), np.cumprod(1 - leave[:-1], axis=0)])


def _hard(entropy, batch, share):
    """Returns the tokens of each document whose entropy is strictly above its interpolated quantile."""
    hard = np.zeros_like(batch.loss_mask)
    for row in range(len(hard)):
        for segment in np.unique(batch.segment_ids[row]):
            members = (batch.segment_ids[row] == segment) & (batch.loss_mask[row] > 0)
            if members.sum() == 1:
                hard[row, members] = 1
            elif members.any():
                hard[row, members] = entropy[row, members] > np.quantile(entropy[row, members], 1 - share)
    return hard
