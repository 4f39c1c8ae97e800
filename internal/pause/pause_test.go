package pause

import (
	"errors"
	"net"
	"testing"
	"time"
)

// A client that connects during a pause is accepted after it; a listener can be closed during one.
func TestPause(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := Listen(tcp.(*net.TCPListener))
	type accepted struct {
		conn net.Conn
		err  error
	}
	got := make(chan accepted, 3)
	accept := func() {
		c, err := l.Accept()
		got <- accepted{c, err}
	}
	go accept()
	resume, paused := l.Pause()
	<-paused
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	select {
	case a := <-got:
		t.Fatalf("accepted during a pause: %+v", a)
	case <-time.After(50 * time.Millisecond): // too short would only hide a fault
	}
	resume()
	resume()
	a := <-got
	if a.err != nil {
		t.Fatal(a.err)
	}
	a.conn.Close()
	l.Pause()
	go accept()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if a := <-got; !errors.Is(a.err, net.ErrClosed) {
		t.Errorf("closed during a pause: %v, want ErrClosed", a.err)
	}
}
