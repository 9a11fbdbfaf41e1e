"""From a device to the host, while the device goes on working."""

import torch

from .ranges import named


def to_host(tensors, device):
    """An iterator over ``tensors`` on the CPU.

    On a CUDA device each is copied to pinned memory on a stream of its own and handed out when the next one has been asked for,
    so that the device draws while the last result travels and is used.
    """
    if device.type != "cuda":
        for tensor in tensors:
            with named("to host"):
                host = tensor.cpu()
            yield host
        return
    copies, pending = torch.cuda.Stream(device), None
    for tensor in tensors:
        tensor = tensor.contiguous()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            host.copy_(tensor, non_blocking=True)
            done = copies.record_event()
        tensor.record_stream(copies)
        if pending is not None:
            yield _arrived(*pending)
        pending = host, done
    if pending is not None:
        yield _arrived(*pending)


def _arrived(host, done):
    with named("to host"):
        done.synchronize()
    return host
