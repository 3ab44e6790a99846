# ResNet-56 of He et al. 2015, section 4.2
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmbasis.CifarResNet', depth=56),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, )))
