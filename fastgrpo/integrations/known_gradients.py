"""A loss whose gradients are taken within the call, where the head is whole, and handed out in the backward."""

import torch

from fastgrpo import ops


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients are already taken; a second backward through the same graph is autograd's error."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, loss, *gradients):
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @ops.once_differentiable
    def backward(ctx, grad_loss):
        # in place: the head's gradient is the largest tensor there is
        gradients = [None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors]
        return *gradients, None, *(None for _ in gradients)


def call(loss, *head):
    return loss(*head)


def with_gradients(loss, *head):
    """``call`` with the gradients taken at once; what comes after may shard or change the head."""
    needed = [torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad for x in head]
    leaves = [x.detach().requires_grad_() if need else x for x, need in zip(head, needed)]
    result = call(loss, *leaves)
    if not any(needed):
        return result
    gradients = iter(torch.autograd.grad(result.loss, [x for x, need in zip(leaves, needed) if need]))
    gradients = [next(gradients) if need else None for need in needed]
    return result._replace(loss=KnownGradients.apply(*head, result.loss.detach(), *gradients))
