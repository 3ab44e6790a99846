# scikit-learn's handwritten digits, written by tools/demo/make_digits.py to
# $MMBASIS_DATA/digits/{train,holdout,test}
data_root = '{{$MMBASIS_DATA:data}}/digits'
hint = f'To write the digits: python tools/demo/make_digits.py {data_root}'

data_preprocessor = dict(
    type='mmpretrain.ClsDataPreprocessor',
    num_classes=10,
    mean=[78., 78., 78.],
    std=[96., 96., 96.],
    to_rgb=True)

# the images have 8x8 pixels
resize = dict(type='Resize', scale=(16, 16), interpolation='bicubic')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='RandomCrop', crop_size=16, padding=2),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    dataset=dict(
        type='mmbasis.ImageFolder',
        data_root=f'{data_root}/train',
        hint=hint,
        pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True))

val_dataloader = dict(
    batch_size=90,
    num_workers=0,
    dataset=dict(
        type='mmbasis.ImageFolder',
        data_root=f'{data_root}/holdout',
        hint=hint,
        pipeline=test_pipeline,
        test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, ))

test_dataloader = dict(
    batch_size=90,
    num_workers=0,
    dataset=dict(
        type='mmbasis.ImageFolder',
        data_root=f'{data_root}/test',
        hint=hint,
        pipeline=test_pipeline,
        test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = val_evaluator
