# Copyright (c) mmbasis authors. All rights reserved.
"""Fake sysfs trees of six boards, in the layouts of JetPack 4 to 7."""
from jetson_helpers import script, write

# Layout, model, L4T, GPU node, chips: address -> (rail, mW) per channel.
BOARDS = {
    'xavier_jp4': ('iio', 'Jetson-AGX', ('32', '7.1'), '17000000.gv11b', {
        '1-0040': [('GPU', 5000), ('CPU', 1000), ('SOC', 2000)],
        '1-0041': [('CV', 100), ('VDDRQ', 900), ('SYS5V', 3000)]
    }),
    'xavier_jp5': ('hwmon', 'NVIDIA Jetson AGX Xavier Developer Kit',
                   ('35', '4.1'), '17000000.gv11b', {
                       '1-0040': [('GPU', 5000), ('CPU', 1000), ('SOC', 2000)],
                       '1-0041': [('CV', 100), ('VDDRQ', 900), ('SYS5V', 3000)]
                   }),
    'orin_jp6': ('hwmon', 'NVIDIA Jetson AGX Orin Developer Kit',
                 ('36', '3.0'), '17000000.gpu', {
                     '1-0040': [('VDD_GPU_SOC', 4000), ('VDD_CPU_CV', 1500),
                                ('VIN_SYS_5V0', 3500)],
                     '1-0041': [('NC', 7), ('VDDQ_VDD2_1V8AO', 600), ('NC', 9)]
                 }),
    'nx_jp4': ('iio', 'NVIDIA Jetson Xavier NX Developer Kit', ('32', '7.1'),
               '17000000.gv11b', {
                   '7-0040': [('VDD_IN', 9000), ('VDD_CPU_GPU_CV', 4000),
                              ('VDD_SOC', 2000)]
               }),
    'nano_jp4': ('iio', 'NVIDIA Jetson Nano Developer Kit', ('32', '7.1'),
                 '57000000.gpu', {
                     '6-0040': [('POM_5V_IN', 4200), ('POM_5V_GPU', 1000),
                                ('POM_5V_CPU', 900)]
                 }),
    # A GPU that is off reads a little below nothing.
    'thor_jp7': ('hwmon', 'NVIDIA Jetson AGX Thor Developer Kit',
                 ('38', '4.0'), 'gpu-gpc-0', {
                     '2-0040': [('VDD_GPU', -390), ('VDD_CPU_SOC_MSS', 3900),
                                ('VIN_SYS_5V0', 5000)],
                     '2-0044': [('VIN', 15000)]
                 }),
}
# What the right total of each tree is, in W, added up by hand.
TOTALS = dict(
    xavier_jp4=12.0,
    xavier_jp5=12.0,
    orin_jp6=9.0,
    nx_jp4=9.0,
    nano_jp4=4.2,
    thor_jp7=15.0)
_DRIVERS = 'sys/bus/i2c/drivers/'
_VOLTAGE = 5000  # mV


def make_board(root, name):
    """Writes the tree of a board; returns its root as text."""
    layout, model, l4t, gpu, chips = BOARDS[name]
    write(root, 'proc/device-tree/model', model + '\0')
    write(root, 'proc/meminfo', 'MemTotal:       32000000 kB\n')
    write(
        root, 'etc/nv_tegra_release',
        '# R{} (release), REVISION: {}, GCID: 1, BOARD: t186ref\n'.format(
            *l4t))
    for number, (address, rails) in enumerate(sorted(chips.items())):
        for i, (rail, power) in enumerate(rails):
            if rail == 'VIN':
                _ina238(root, address, power)
            elif layout == 'iio':
                _iio(root, address, number, i, rail, power)
            else:
                _hwmon(root, address, number, i, rail, power)
    _clocks(root, gpu)
    _programs(root)
    return str(root)


def rail_file(root, rail_chip='1-0040', number=0, channel=0):
    """Returns the power file of a rail in a JetPack 4 tree."""
    return '{}/{}ina3221x/{}/iio:device{}/in_power{}_input'.format(
        root, _DRIVERS, rail_chip, number, channel)


def _iio(root, address, number, i, rail, power):
    folder = '{}ina3221x/{}/iio:device{}/'.format(_DRIVERS, address, number)
    write(root, folder + 'rail_name_%d' % i, rail + '\n')
    write(root, folder + 'in_power%d_input' % i, '%d\n' % power)


def _hwmon(root, address, number, i, rail, power):
    folder = '{}ina3221/{}/hwmon/hwmon{}/'.format(_DRIVERS, address,
                                                  number + 3)
    write(root, folder + 'in%d_label' % (i + 1), rail + '\n')
    write(root, folder + 'in%d_enable' % (i + 1), '1\n')
    write(root, folder + 'in%d_input' % (i + 1), '%d\n' % _VOLTAGE)
    write(root, folder + 'curr%d_input' % (i + 1),
          '%d\n' % (power * 1000 // _VOLTAGE))
    # Traps: shunt voltages, and the sum that the driver offers.
    write(root, folder + 'in%d_input' % (i + 4), '123\n')
    write(root, folder + 'in7_label', 'sum of shunt voltages\n')
    write(root, folder + 'in7_input', '369\n')


def _ina238(root, address, power):
    folder = '{}ina238/{}/hwmon/hwmon7/'.format(_DRIVERS, address)
    write(root, folder + 'power1_input', '%d\n' % (power * 1000))
    write(root, folder + 'in0_input', '12\n')  # the shunt, no rail


def _clocks(root, gpu):
    folder = 'sys/class/devfreq/{}/'.format(gpu)
    for name, value in (('cur_freq', 1377000000), ('min_freq', 1377000000),
                        ('max_freq', 1377000000), ('governor',
                                                   'nvhost_podgov')):
        write(root, folder + name, '%s\n' % value)
    if gpu == 'gpu-gpc-0':  # Thor: video has a clock of its own, memory too
        write(root, 'sys/class/devfreq/gpu-nvd-0/cur_freq', '1\n')
        write(root, 'sys/class/devfreq/bwmgr/cur_freq', '4266000000\n')
    cpu = 'sys/devices/system/cpu/cpufreq/policy0/scaling_'
    for name, value in (('cur_freq', 2265600), ('min_freq', 2265600),
                        ('max_freq', 2265600), ('governor', 'schedutil')):
        write(root, cpu + name, '%s\n' % value)
    zones = (('CPU-therm', 41500), ('GPU-therm', 43000), ('PMIC-Die', 100000),
             ('CV0-therm', -256000))
    for i, (name, value) in enumerate(zones):
        zone = 'sys/class/thermal/thermal_zone%d/' % i
        write(root, zone + 'type', name + '\n')
        write(root, zone + 'temp', '%d\n' % value)
    for i, (name, value) in enumerate((('pwm-fan', 3), ('gpu-balanced', 0))):
        folder = 'sys/class/thermal/cooling_device%d/' % i
        write(root, folder + 'type', name + '\n')
        write(root, folder + 'cur_state', '%d\n' % value)
    write(root, 'sys/class/hwmon/hwmon9/oc1_event_cnt', '0\n')


def _programs(root):
    """Writes nvpmodel and jetson_clocks, which keep their state in files."""
    state = '{}/state'.format(root)
    write(root, 'state/mode', '2\n')
    write(root, 'state/clocks', 'free\n')
    log = 'echo "$(basename $0) $*" >> {}/log\n'.format(state)
    script(
        root, 'usr/sbin/nvpmodel', log + """
if [ "$1" = -q ]; then
  printf 'NV Power Mode: MODE_%s\\n%s\\n' $(cat {0}/mode) $(cat {0}/mode)
else echo $2 > {0}/mode; fi
""".format(state))
    script(
        root, 'usr/bin/jetson_clocks', log + """
case "$1" in
  --store) cp {0}/clocks "$2";;
  --restore) cp "$2" {0}/clocks;;
  *) echo fixed > {0}/clocks;;
esac
""".format(state))
