"""Autoencoding as a method of the trainer: its losses by their formulas, and what is refused."""

import pytest
import torch

from advkd.data.draws import Draw
from advkd.data.images import normalize
from advkd.data.sources import Tensors
from advkd.errors import InputError
from advkd.methods.autoencoding import AutoencoderTrainingConfig, Autoencoding
from advkd.models.autoencoder import build_autoencoder
from advkd.training.trainer import Trainer

from ..conftest import killed_after


def tiny_run(data, out, seed=0, weights=0, regularisation="kl", **options):
    """Six updates on random pictures."""
    strong = {"kl": 0.1} if regularisation == "kl" else {"codes": 16}
    config = AutoencoderTrainingConfig(
        regularisation=regularisation, channels=(8, 8), steps=6, batch_size=8, checkpoint_every=2, warmup=2, seed=seed, **strong
    )
    images = torch.randint(256, (20, 1, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    torch.manual_seed(seed + weights)
    network = build_autoencoder(regularisation, (1, 16, 16), config.channels, config.latent_channels, config.codes)
    return Trainer(Autoencoding(config, network), Tensors(images=images), None, out, **options)


def first_batch(run):
    """Images and draws of the first update, before it is made."""
    x = normalize(run.data.tensors["images"][run.rows(0, 8)]).double()
    return x, Draw(run.settings.seed, 0, 8, "cpu", torch.float64)


def test_the_loss_of_a_posterior(tmp_path):
    """|x - D(mean + std eps)| a pixel, and 0.1 of 1/2 (mean^2 + var - 1 - log var), summed over latents, for each pixel."""
    run = tiny_run(None, tmp_path, dtype=torch.float64, progress=False)
    x, draw = first_batch(run)
    network = run.running["student"].part.module
    with torch.no_grad():
        mean, log_variance = network.quant_conv(network.encoder(x)).chunk(2, dim=1)
        z = mean + (log_variance / 2).exp() * draw.normal("z", *mean.shape[1:])
        error = (network.decoder(network.post_quant_conv(z)) - x).abs().mean()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1).mean()
    found = run.step()
    assert found["error"] == pytest.approx(error.item(), rel=1e-9)
    assert found["loss"] == pytest.approx((error + 0.1 * divergence / x[0].numel()).item(), rel=1e-9)


def test_the_loss_of_a_codebook(tmp_path):
    """|x - D(e)| a pixel at the nearest codes e, and (1 + 1/4) (z - e)^2: both move, the codes a quarter as far."""
    run = tiny_run(None, tmp_path, regularisation="vq", dtype=torch.float64, progress=False)
    x, _ = first_batch(run)
    network = run.running["student"].part.module
    codes = network.quantize.embedding.weight
    with torch.no_grad():
        z = network.quant_conv(network.encoder(x))
        nearest = (z.movedim(1, -1)[..., None, :] - codes).square().sum(dim=-1).argmin(dim=-1)
        e = codes[nearest].movedim(-1, 1)
        error = (network.decoder(network.post_quant_conv(e)) - x).abs().mean()
        expected = error + 1.25 * (z - e).square().mean()
    before = codes.clone()
    assert run.step()["loss"] == pytest.approx(expected.item(), rel=1e-9)
    moved = (codes != before).any(dim=1)
    assert moved[nearest.unique()].all() and moved.sum() == len(nearest.unique())


NEVER = {
    **dict.fromkeys(("steps", "batch_size", "checkpoint_every"), (-1, 0)),
    "size": (4, 24),
    "regularisation": ("", "KL"),
    "latent_channels": (0, 5),
    "channels": ((), (12, 16)),
    "codes": (1,),
    "warmup": (-1,),
    "kl": (-1.0,),
    "ema": (-0.1, 1.0),
    "learning_rate": (-1, 0),
    "seed": (-1, 2**63),
}


@pytest.mark.parametrize("field", NEVER)
def test_numbers_that_cannot_work_are_refused_by_name(field):
    for value in NEVER[field]:
        with pytest.raises(InputError, match=f"^{field} must"):
            AutoencoderTrainingConfig(**{field: value}).validate()


def test_a_killed_run_of_a_codebook_goes_on(tmp_path):
    """The codes and their average are those of a run that was not killed."""
    whole = tiny_run(None, tmp_path / "whole", regularisation="vq", progress=False).run().state_dict()
    with killed_after(5):
        tiny_run(None, tmp_path / "killed", regularisation="vq", progress=False).run()
    resumed = tiny_run(None, tmp_path / "killed", regularisation="vq", progress=False, resume=True)
    assert resumed.update == 4
    found = resumed.run().state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
