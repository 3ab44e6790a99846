# Copyright (c) mmbasis authors. All rights reserved.
"""Compress, fine-tune and export a plain PyTorch model of timm or torchvision.

Images are generated, so nothing is downloaded: squares and stripes in a colour
for each class. Without --pretrained or --weights the dense model is trained on
them first. Writes model.onnx and report.json; exits with 1 when ONNX Runtime
and PyTorch differ.

    python tools/demo/torch_models.py --model timm:resnet50
"""
import argparse
import json
import os
import sys

import torch
import torch.nn.functional as F

import mmbasis
from mmbasis.utils.io import write_atomically

#: largest difference of outputs, relative to the largest output
TOLERANCE = 1e-3


def build(name: str, classes: int, size: int, pretrained: bool = False):
    """Build a classifier from ``'timm:NAME'`` or ``'torchvision:NAME'``."""
    library, _, name = name.partition(':')
    options = dict(num_classes=classes)
    # transformers hold positions for one size
    has_positions = any(x in name for x in ('vit', 'deit', 'swin'))
    if library == 'timm':
        import timm
        if has_positions:
            options['img_size'] = size
        return timm.create_model(name, pretrained=pretrained, **options)
    if library != 'torchvision':
        raise ValueError(f"the model is 'timm:NAME' or 'torchvision:NAME', "
                         f'not {library}:{name}')
    import torchvision
    if pretrained:  # its number of classes and its size are those of weights
        return torchvision.models.get_model(name, weights='DEFAULT')
    if name.startswith('vit'):
        options['image_size'] = size
    return torchvision.models.get_model(name, weights=None, **options)


def make_batches(count: int, size: int, classes: int, batch_size: int = 16,
                 seed: int = 0) -> list:
    """Batches of images, ``(N, 3, size, size)``, and labels."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(
        classes, 3, 1, 1, generator=torch.Generator().manual_seed(9))
    batches = []
    for _ in range(count):
        labels = torch.randint(classes, (batch_size, ), generator=generator)
        images = .5 * torch.randn(
            batch_size, 3, size, size, generator=generator)
        for image, label in zip(images, labels):
            x, y = torch.randint(size // 2, (2, ), generator=generator)
            step = 1 + int(label) % 2  # squares, or stripes
            image[:, y:y + size // 2:step,
                  x:x + size // 2] += 2 * colours[label]
        batches.append((images, labels))
    return batches


def train(model, batches: list, epochs: int, lr: float) -> list:
    """Train as any PyTorch model; the mean loss of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=.9)
    model.train()
    history = []
    for _ in range(epochs):
        losses = []
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            losses.append(float(loss))
        history.append(sum(losses) / len(losses))
    return history


@torch.no_grad()
def measure_loss(model, batches: list) -> float:
    """The mean cross-entropy in evaluation mode."""
    model.eval()
    losses = [F.cross_entropy(model(x), y) for x, y in batches]
    return float(torch.stack(losses).mean())


def export(model, images, path: str) -> float:
    """Write an ONNX file and run it; the largest difference of its outputs
    from PyTorch's, relative to the largest output."""
    import onnxruntime

    from mmbasis.running import tensors
    model.eval()
    torch.onnx.export(model, (images, ), path, input_names=['input'],
                      opset_version=17)
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider'])
    found = session.run(None, {'input': images.numpy()})
    with torch.no_grad():
        wanted = list(tensors(model(images)))
    return max(
        float((torch.from_numpy(x) - y).abs().max() / y.abs().max())
        for x, y in zip(found, wanted))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True,
                        help='timm:NAME or torchvision:NAME')
    parser.add_argument('--weights', help='a state dict of the dense model')
    parser.add_argument('--pretrained', action='store_true',
                        help="the library's weights, which it downloads")
    parser.add_argument('--macs', type=float, default=.5,
                        help='fraction of the MACs to keep (default 0.5)')
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--image-size', type=int, default=64)
    parser.add_argument('--batches', type=int, default=4,
                        help='batches of 16 images of an epoch (default 4)')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--work-dir', default='work_dirs/torch_models')
    return parser.parse_args()


def main() -> int:
    """Run all steps and report."""
    args = parse_args()
    torch.manual_seed(0)
    model = build(args.model, args.classes, args.image_size, args.pretrained)
    images = make_batches(args.batches, args.image_size, args.classes)
    if args.weights:
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    elif not args.pretrained:
        train(model, images, args.epochs, .02)
    losses = dict(dense=measure_loss(model, images))

    plan = mmbasis.compress(
        model, dict(type='BudgetPlanner', macs=args.macs), images,
        num_batches=max(1, len(images) - 1))
    losses['compressed'] = measure_loss(model, images)
    history = train(model, images, args.epochs, .005)
    losses['fine-tuned'] = measure_loss(model, images)

    os.makedirs(args.work_dir, exist_ok=True)
    path = os.path.join(args.work_dir, 'model.onnx')
    difference = export(model, images[0][0], path)
    report = dict(
        model=args.model, layers=len(plan.layers), macs=plan.totals()['macs'],
        losses=losses, fine_tuning=history, onnx=path, difference=difference)
    plan.save(os.path.join(args.work_dir, 'plan.json'))
    torch.save(model.state_dict(), os.path.join(args.work_dir, 'model.pth'))
    write_atomically(os.path.join(args.work_dir, 'report.json'),
                     json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    return 0 if difference < TOLERANCE else 1


if __name__ == '__main__':
    sys.exit(main())
