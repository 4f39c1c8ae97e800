package fanout

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/ethtool.h.
const (
	ethtoolGetStrings  = 0x1b // ETHTOOL_GSTRINGS
	ethtoolSetFeatures = 0x3b // ETHTOOL_SFEATURES
	stringsFeatures    = 4    // ETH_SS_FEATURES
	stringLen          = 32   // ETH_GSTRING_LEN
	maxFeatures        = 128
)

// setFeature enables an offload that has no ethtool command of its own.
func setFeature(ifname, feature string) error {
	order := binary.NativeEndian
	// struct ethtool_gstrings: cmd, string_set, len, data.
	names := make([]byte, 12+maxFeatures*stringLen)
	order.PutUint32(names, ethtoolGetStrings)
	order.PutUint32(names[4:], stringsFeatures)
	if err := ethtool(ifname, names); err != nil {
		return fmt.Errorf("read the features' names: %w", err)
	}
	for i := range int(order.Uint32(names[8:])) {
		name, _, _ := bytes.Cut(names[12+i*stringLen:][:stringLen], []byte{0})
		if string(name) != feature {
			continue
		}
		// struct ethtool_sfeatures: cmd, size, blocks of {valid, requested}.
		blocks := (int(order.Uint32(names[8:])) + 31) / 32
		set := make([]byte, 8+8*blocks)
		order.PutUint32(set, ethtoolSetFeatures)
		order.PutUint32(set[4:], uint32(blocks))
		order.PutUint32(set[8+8*(i/32):], 1<<(i%32))
		order.PutUint32(set[12+8*(i/32):], 1<<(i%32))
		return ethtool(ifname, set)
	}
	return fmt.Errorf("feature %s: not known to the kernel", feature)
}

func ethtool(ifname string, data []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // the rest of struct ifreq's union
	}
	copy(request.name[:len(request.name)-1], ifname)
	request.data = unsafe.Pointer(&data[0])
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}
