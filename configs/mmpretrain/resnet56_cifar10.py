_base_ = [
    '../_base_/models/resnet56_cifar.py',
    '../_base_/datasets/cifar10_folder.py',
    '../_base_/schedules/cifar10_bs128.py',
    '../_base_/default_runtime.py',
]
# the source starts deeper networks at 0.01; 0.1 trains ResNet-56 from the
# first step
