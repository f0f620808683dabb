"""Class activation maps."""

import copy

import PIL.ImageFont
import torch
from torch import nn

from cxr.errors import Failure
from cxr.files import atomic_write
from cxr.folders import CLASSES, COLOURS


def class_maps(model, pixels):
    """Maps float32 (n, h, w) of uint8 (n, 1, SIZE, SIZE), or None where the network has none.

    A network that ends in global average pooling and one Linear gives the logit as the mean over
    positions of weight . last feature map + bias (Zhou et al. 2016): that sum is the map, positive
    where it speaks for PNEUMONIA. The last feature map is told by its mean, which is the features.
    """
    device, width = model.device, model.backbone.width
    network = copy.deepcopy(model.backbone.network).to(device)
    outputs = []

    def keep(module, inputs, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] == width:
            outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    with torch.inference_mode():
        features = network(model.backbone.normalize(pixels.to(device)))
    for hook in hooks:
        hook.remove()
    # compared only now: a DenseNet's last ReLU changes the map in place
    for output in reversed(outputs):
        tolerance = 1e-4 * features.abs().max().item()
        mean = output.mean((2, 3))
        if output[0, 0].numel() > 1 and torch.allclose(mean, features, rtol=1e-3, atol=tolerance):
            maps = torch.einsum("nchw,c->nhw", output.cpu(), model.head.weight[0])
            return maps + model.head.bias
    return None


def overlay(view, heat):
    """The picture uint8 (1, SIZE, SIZE) under its map: orange for PNEUMONIA, blue for NORMAL."""
    from matplotlib.colors import to_rgb

    view = view[0, :, :, None].float()
    heat = nn.functional.interpolate(heat[None, None], view.shape[:2], mode="bilinear")
    heat = heat[0, 0, :, :, None]
    orange, blue = (torch.tensor(to_rgb(COLOURS[label])) * 255 for label in (1, 0))
    strength = 0.7 * heat.abs() / heat.abs().max().clamp(min=1e-12)
    picture = view * (1 - strength) + torch.where(heat > 0, orange, blue) * strength
    return picture.round().byte().numpy()


def read_overlays(model, views, rows):
    """Yields (picture, overlay or None), uint8 (SIZE, SIZE) and (SIZE, SIZE, 3), of these rows.

    views: common.Views of the images.
    """
    for start in range(0, len(rows), 16):
        found = [views[i] for i in rows[start : start + 16]]
        for i, _, reason in found:
            if reason:
                raise Failure(f"{views.images[i].path}: {reason}; it could be read a moment ago")
        pixels = torch.cat([pictures for _, pictures, _ in found])
        maps = class_maps(model, pixels)
        for i, view in enumerate(pixels):
            yield view[0].numpy(), None if maps is None else overlay(view, maps[i])


def write_overlays(folder, model, views, table):
    """One PNG an image in `folder`, below the name of its class if it has one."""
    taken, images = set(), views.images
    pictures = read_overlays(model, views, range(len(images)))
    for image, prob, (_, picture) in zip(images, table.probs, pictures, strict=True):
        group = folder if image.label is None else folder / CLASSES[image.label]
        path, number = group / f"{image.path.name}.png", 2
        while path in taken:  # a namesake from another folder
            path, number = group / f"{image.path.name}-{number}.png", number + 1
        taken.add(path)
        told = f"P(PNEUMONIA) {prob:.3f}"
        told += "" if image.label is None else f", labelled {CLASSES[image.label]}"
        page = PIL.Image.new("RGB", (448, 488), "white")
        page.paste(PIL.Image.fromarray(picture).resize((448, 448)), (0, 40))
        caption = f"{told}\norange speaks for PNEUMONIA, blue for NORMAL"
        PIL.ImageDraw.Draw(page).text((4, 2), caption, "black", PIL.ImageFont.load_default(14))
        with atomic_write(path) as file:
            page.save(file, format="png")
    print(f"Class activation maps of {len(images)} images in {folder}")
