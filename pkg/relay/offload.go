package relay

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A device that takes VLAN tags off the frames that it receives hides them from XDP,
// which then sees untagged frames. While a rule matches tags on an interface, that
// is switched off.

// vlanFeatures are what must be off: for the tags of IEEE 802.1Q, and for the outer
// ones of 802.1ad (netdev_features_strings of net/ethtool/common.c).
var vlanFeatures = [...]string{"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"}

// offloads are the features that the relay has switched off, by interface name. The
// file keeps them for a later process, since the rules outlive this one.
type offloads struct {
	file string
	off  map[string][]string
	open func(ifname string) (featureSet, error) // openFeatures; tests inject faults
}

// featureSet is the features of one interface.
type featureSet interface {
	active(name string) bool
	set(names []string, on bool) error
	Close()
}

func readOffloads(file string) (*offloads, error) {
	o := &offloads{file: file, off: map[string][]string{}, open: openFeatures}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &o.off)
	}
	if err != nil {
		return nil, fmt.Errorf("features switched off earlier: %s: %w; remove the file to forget them", file, err)
	}
	return o, nil
}

func (o *offloads) save() error {
	if len(o.off) == 0 {
		if err := os.Remove(o.file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(o.off)
	if err != nil {
		return err
	}
	if err := stageFile(o.file, append(data, '\n')); err != nil {
		return err
	}
	return commitFile(o.file)
}

// showTags makes an interface leave tags in the frames. It may be called again.
func (o *offloads) showTags(ifname string) error {
	f, err := o.open(ifname)
	if err != nil {
		return err
	}
	defer f.Close()
	var on []string
	for _, name := range vlanFeatures {
		if f.active(name) {
			on = append(on, name)
		}
	}
	if len(on) == 0 {
		return nil
	}
	// Noted first: what dies in between leaves too much to restore, not too little.
	o.off[ifname] = union(o.off[ifname], on)
	if err := o.save(); err != nil {
		return fmt.Errorf("note the features of interface %s: %w", ifname, err)
	}
	if err := f.set(on, false); err != nil {
		return fmt.Errorf("interface %s takes VLAN tags off before XDP sees them, and that cannot be switched off (ethtool -K %s rxvlan off): %w", ifname, ifname, err)
	}
	return nil
}

// restore gives interfaces that no rule needs so any more what they had, and keeps
// those named. An interface that is gone is forgotten.
func (o *offloads) restore(keep map[string]bool) error {
	var errs []error
	for _, ifname := range slices.Sorted(maps.Keys(o.off)) {
		if keep[ifname] {
			continue
		}
		features := o.off[ifname]
		delete(o.off, ifname)
		f, err := o.open(ifname)
		if err != nil {
			if !errors.Is(err, unix.ENODEV) {
				errs = append(errs, err)
			}
			continue
		}
		if err := f.set(features, true); err != nil {
			errs = append(errs, fmt.Errorf("switch %s of interface %s on again: %w", strings.Join(features, ", "), ifname, err))
		}
		f.Close()
	}
	return errors.Join(append(errs, o.save())...)
}

// note says what has been done to an interface; "" for nothing.
func (o *offloads) note(ifname string) string {
	if len(o.off[ifname]) == 0 {
		return ""
	}
	return fmt.Sprintf("%s is off while rules match VLAN tags here", strings.Join(o.off[ifname], " and "))
}

func union(a, b []string) []string {
	all := append(slices.Clone(a), b...)
	slices.Sort(all)
	return slices.Compact(all)
}

// Of include/uapi/linux/ethtool.h.
const (
	ethtoolGetFeatures = 0x3a
	ethtoolSetFeatures = 0x3b
	ethtoolGetStrings  = 0x1b
	ethtoolGetSetInfo  = 0x37
	ethSSFeatures      = 4
	ethGStringLen      = 32
)

// features are those of one interface.
type features struct {
	fd     int
	ifname string
	names  map[string]int // bit number
	blocks []featureBlock
}

// featureBlock is 32 features: struct ethtool_get_features_block.
type featureBlock struct{ available, requested, active, neverChanged uint32 }

// openFeatures reads the features of an interface in the calling thread's network
// namespace. The caller must Close it.
func openFeatures(ifname string) (_ featureSet, err error) {
	f := &features{ifname: ifname, names: map[string]int{}}
	if f.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("ethtool socket: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			err = fmt.Errorf("features of interface %s: %w", ifname, err)
		}
	}()
	if err := f.readNames(); err != nil {
		return nil, err
	}
	return f, f.readState()
}

// Close closes the socket.
func (f *features) Close() { _ = unix.Close(f.fd) }

func (f *features) readNames() error {
	// struct ethtool_sset_info with room for one count.
	info := binary.NativeEndian.AppendUint32(nil, ethtoolGetSetInfo)
	info = binary.NativeEndian.AppendUint32(info, 0)
	info = binary.NativeEndian.AppendUint64(info, 1<<ethSSFeatures)
	info = binary.NativeEndian.AppendUint32(info, 0)
	if err := f.ioctl(info); err != nil {
		return err
	}
	count := binary.NativeEndian.Uint32(info[16:])
	// struct ethtool_gstrings.
	text := binary.NativeEndian.AppendUint32(nil, ethtoolGetStrings)
	text = binary.NativeEndian.AppendUint32(text, ethSSFeatures)
	text = binary.NativeEndian.AppendUint32(text, count)
	text = append(text, make([]byte, int(count)*ethGStringLen)...)
	if err := f.ioctl(text); err != nil {
		return err
	}
	for i := range int(count) {
		name, _, _ := bytes.Cut(text[12+i*ethGStringLen:][:ethGStringLen], []byte{0})
		f.names[string(name)] = i
	}
	f.blocks = make([]featureBlock, (count+31)/32)
	return nil
}

func (f *features) readState() error {
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

// active says whether a feature is on; one that the kernel does not know is not.
func (f *features) active(name string) bool {
	bit, ok := f.names[name]
	return ok && f.blocks[bit/32].active&(1<<(bit%32)) != 0
}

// set switches features on or off, and checks that they then are.
func (f *features) set(names []string, on bool) error {
	// struct ethtool_sfeatures: valid and requested of each block.
	data := binary.NativeEndian.AppendUint32(nil, ethtoolSetFeatures)
	data = binary.NativeEndian.AppendUint32(data, uint32(len(f.blocks)))
	valid, requested := make([]uint32, len(f.blocks)), make([]uint32, len(f.blocks))
	for _, name := range names {
		bit, ok := f.names[name]
		if !ok {
			continue
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
		if _, ok := f.names[name]; ok && f.active(name) != on {
			return fmt.Errorf("%s is fixed: %w", name, unix.EOPNOTSUPP)
		}
	}
	return nil
}

// ioctl makes a SIOCETHTOOL request whose data the kernel reads and writes.
func (f *features) ioctl(data []byte) error {
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
