package forward

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// channels holds the numbers of queues that an interface uses.
type channels struct{ rx, tx int }

// ReceiveQueues returns how many receive queues an interface uses. Errors to match:
// unix.ENODEV.
func ReceiveQueues(ifname string) (int, error) {
	c, err := channelsOf(ifname)
	return c.rx, err
}

// ethtoolChannels is struct ethtool_channels of include/uapi/linux/ethtool.h.
type ethtoolChannels struct {
	cmd                                   uint32
	maxRX, maxTX, maxOther, maxCombined   uint32
	rxCount, txCount, otherCount, combine uint32
}

// channelsOf asks the driver (ETHTOOL_GCHANNELS). A driver without support counts as one
// queue in each direction. Errors to match: unix.ENODEV.
func channelsOf(ifname string) (channels, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return channels{}, fmt.Errorf("ethtool socket: %w", err)
	}
	defer unix.Close(fd)
	c := ethtoolChannels{cmd: unix.ETHTOOL_GCHANNELS}
	request, err := unix.NewIfreq(ifname)
	if err != nil {
		return channels{}, fmt.Errorf("queues of %s: %w", ifname, err)
	}
	err = ioctlData(fd, request, unsafe.Pointer(&c))
	if errors.Is(err, unix.EOPNOTSUPP) {
		return channels{1, 1}, nil
	}
	if err != nil {
		return channels{}, fmt.Errorf("queues of %s: %w", ifname, err)
	}
	return channels{max(1, int(c.rxCount+c.combine)), max(1, int(c.txCount+c.combine))}, nil
}

// ifreqData is struct ifreq with ifr_data.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16 - unsafe.Sizeof(uintptr(0))]byte
}

func ioctlData(fd int, named *unix.Ifreq, data unsafe.Pointer) error {
	request := ifreqData{data: data}
	copy(request.name[:], named.Name())
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return errno
	}
	return nil
}
