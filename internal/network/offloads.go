package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TagFeatures are the device features that strip VLAN tags off received frames before XDP sees
// them: those of IEEE 802.1Q, and the outer ones of 802.1ad (netdev_features_strings of
// net/ethtool/common.c).
func TagFeatures() []string { return []string{"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"} }

// From include/uapi/linux/ethtool.h.
const (
	ethtoolGetFeatures = 0x3a
	ethtoolSetFeatures = 0x3b
	ethtoolGetStrings  = 0x1b
	ethtoolGetSetInfo  = 0x37
	ethSSFeatures      = 4
	ethGStringLen      = 32

	// maxFeatures is a sanity limit for the kernel's answer; it has some 60.
	maxFeatures = 4096
)

// DeviceFeatures are the features of one interface, as ethtool -k shows them.
type DeviceFeatures struct {
	fd     int
	ifname string
	names  map[string]int // bit number
	blocks []featureBlock
}

// featureBlock is 32 features: struct ethtool_get_features_block.
type featureBlock struct{ available, requested, active, neverChanged uint32 }

// OpenFeatures reads the features of an interface in the calling thread's network namespace. The
// caller must Close them. Errors to match: unix.ENODEV.
func OpenFeatures(ifname string) (_ *DeviceFeatures, err error) {
	f := &DeviceFeatures{ifname: ifname, names: map[string]int{}}
	if f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("ethtool socket: %w", err)
	}
	err = f.readNames()
	if err == nil {
		err = f.readState()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("features of interface %s: %w", ifname, err), f.Close())
	}
	return f, nil
}

// Close closes the socket.
func (f *DeviceFeatures) Close() error { return unix.Close(f.fd) }

func (f *DeviceFeatures) readNames() error {
	// struct ethtool_sset_info with space for one count.
	info := binary.NativeEndian.AppendUint32(nil, ethtoolGetSetInfo)
	info = binary.NativeEndian.AppendUint32(info, 0)
	info = binary.NativeEndian.AppendUint64(info, 1<<ethSSFeatures)
	info = binary.NativeEndian.AppendUint32(info, 0)
	if err := f.ioctl(info); err != nil {
		return err
	}
	count := binary.NativeEndian.Uint32(info[16:])
	if count > maxFeatures {
		return fmt.Errorf("%d of them: %w", count, unix.EBADMSG)
	}
	// struct ethtool_gstrings.
	names := binary.NativeEndian.AppendUint32(nil, ethtoolGetStrings)
	names = binary.NativeEndian.AppendUint32(names, ethSSFeatures)
	names = binary.NativeEndian.AppendUint32(names, count)
	names = append(names, make([]byte, int(count)*ethGStringLen)...)
	if err := f.ioctl(names); err != nil {
		return err
	}
	for i := range int(count) {
		name, _, _ := bytes.Cut(names[12+i*ethGStringLen:][:ethGStringLen], []byte{0})
		f.names[string(name)] = i
	}
	f.blocks = make([]featureBlock, (count+31)/32)
	return nil
}

func (f *DeviceFeatures) readState() error {
	const size = 16 // of a block
	// struct ethtool_gfeatures.
	data := binary.NativeEndian.AppendUint32(nil, ethtoolGetFeatures)
	data = binary.NativeEndian.AppendUint32(data, uint32(len(f.blocks)))
	data = append(data, make([]byte, size*len(f.blocks))...)
	if err := f.ioctl(data); err != nil {
		return err
	}
	for i := range f.blocks {
		b := data[8+size*i:]
		f.blocks[i] = featureBlock{
			binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:]),
			binary.NativeEndian.Uint32(b[8:]), binary.NativeEndian.Uint32(b[12:]),
		}
	}
	return nil
}

// Active says whether a feature was on when it was last read or set; unknown features are off.
func (f *DeviceFeatures) Active(name string) bool {
	bit, ok := f.names[name]
	return ok && f.blocks[bit/32].active&(1<<(bit%32)) != 0
}

// Set switches features on or off, and checks the result: the error matches unix.EOPNOTSUPP if a
// driver does not allow it. Features unknown to the kernel are skipped.
func (f *DeviceFeatures) Set(names []string, on bool) error {
	// struct ethtool_sfeatures: valid and requested of each block.
	data := binary.NativeEndian.AppendUint32(nil, ethtoolSetFeatures)
	data = binary.NativeEndian.AppendUint32(data, uint32(len(f.blocks)))
	valid, requested := make([]uint32, len(f.blocks)), make([]uint32, len(f.blocks))
	for _, name := range names {
		bit, ok := f.names[name]
		if !ok || f.blocks[bit/32].neverChanged&(1<<(bit%32)) != 0 {
			continue // the kernel would refuse all of them with EINVAL
		}
		valid[bit/32] |= 1 << (bit % 32)
		if on {
			requested[bit/32] |= 1 << (bit % 32)
		}
	}
	for i := range f.blocks {
		data = binary.NativeEndian.AppendUint32(data, valid[i])
		data = binary.NativeEndian.AppendUint32(data, requested[i])
	}
	if err := f.ioctl(data); err != nil {
		return err
	}
	if err := f.readState(); err != nil {
		return err
	}
	for _, name := range names {
		if _, ok := f.names[name]; ok && f.Active(name) != on {
			return fmt.Errorf("%s is fixed: %w", name, unix.EOPNOTSUPP)
		}
	}
	return nil
}

// ioctl makes a SIOCETHTOOL request whose data the kernel reads and writes.
func (f *DeviceFeatures) ioctl(data []byte) error {
	var ifr struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // the rest of struct ifreq's union
	}
	if len(f.ifname) >= len(ifr.name) {
		return fmt.Errorf("name is longer than %d bytes: %w", len(ifr.name)-1, unix.ENODEV)
	}
	copy(ifr.name[:], f.ifname)
	ifr.data = unsafe.Pointer(&data[0])
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}
