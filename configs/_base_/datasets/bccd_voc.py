# BCCD: 364 microscope images of 640x480 with boxes of blood cells, in the
# layout of VOC: 205 to train, 87 to validate, 72 to test. To get it:
# git clone --depth 1 https://github.com/Shenggan/BCCD_Dataset data/bccd
# (or $MMBASIS_DATA/bccd)
dataset_type = 'VOCDataset'
data_root = '{{$MMBASIS_DATA:data}}/bccd/BCCD/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
size = (320, 320)
grey = dict(img=(114, 114, 114))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomResize',
        scale=size,
        ratio_range=(0.8, 1.25),
        keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='Pad', size=(416, 416), pad_val=grey),
    dict(type='RandomCrop', crop_size=size),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='Pad', size=size, pad_val=grey),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]

train_dataloader = dict(
    batch_size=8,
    # on two cores workers would only take time from the network
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file='ImageSets/Main/train.txt',
        data_prefix=dict(sub_data_root=''),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file='ImageSets/Main/val.txt',
        data_prefix=dict(sub_data_root=''),
        test_mode=True,
        pipeline=test_pipeline))
# the 72 test images: --cfg-options
# test_dataloader.dataset.ann_file=ImageSets/Main/test.txt
test_dataloader = val_dataloader

# mAP at an IoU of 0.5
val_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='area')
test_evaluator = val_evaluator
