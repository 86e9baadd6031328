"""The training forward of the shapes model against the library's packed forward."""

import torch

from pyramid_serve.pyramid_flow import flux
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from tools.shapes.teacher_forcing import forward, pyramid

CONFIG = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "in_channels": 64,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
}


def test_units_that_share_their_history_are_predicted_as_the_packed_forward_does() -> None:
    torch.manual_seed(0)
    model = flux.from_config(CONFIG)
    latents = torch.randn(2, 16, 5, 16, 16)
    embeds, pooled = torch.randn(2, 6, 24), torch.randn(2, 20)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    timesteps = torch.tensor([700.0, 321.0])
    levels = pyramid(latents)
    units = (0, 1, 2, 4)
    for stage in range(3):
        noisy = torch.randn(2, 16, len(units), *levels[stage].shape[3:])
        with torch.no_grad():
            together = forward(
                model,
                stage=stage,
                units=units,
                noisy=noisy,
                history=levels,
                timesteps=timesteps,
                prompt_embeds=embeds,
                prompt_mask=mask,
                pooled=pooled,
            )
            for clip in range(2):
                prompt = PromptEmbeds(embeds[clip, mask[clip]], pooled[clip])
                for index, unit in enumerate(units):
                    clips = (*history_clips(latents[clip, :, :unit], stage), noisy[clip, :, index : index + 1])
                    (alone,) = model([ClipSequence(prompt, clips, float(timesteps[clip]))])
                    torch.testing.assert_close(together[clip, :, index : index + 1], alone, atol=2e-5, rtol=2e-4)
