package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"xdpcast/internal/labtest"
	"xdpcast/internal/tap"
)

// A tap that is refused is answered once the first byte of the request's body has arrived: an answer
// before it, and a closed connection, would fail the client's write, and the reason would be lost.
func TestRefusedTapIsAnsweredAfterTheBodyBegins(t *testing.T) {
	refuse := func(context.Context, TapQuery, func() io.Writer) error {
		return Errorf(KindInvalid, "rule cam1 has no slot 7")
	}
	socket := serve(t, &fake{}, Options{Tap: refuse})
	for query, want := range map[string]string{"": "rule cam1 has no slot 7", "?nonsense=1": "nonsense"} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /v1/rules/cam1/tap%s HTTP/1.1\r\nHost: xdpcast\r\nTransfer-Encoding: chunked\r\n\r\n", query)
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		if n, err := conn.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("tap%s is answered before its body begins: %q, %v", query, b[:n], err)
			continue
		}
		if _, err := io.WriteString(conn, "1\r\n\n\r\n"); err != nil {
			t.Errorf("tap%s: %v", query, err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(labtest.Timeout)); err != nil {
			t.Fatal(err)
		}
		n, err := conn.Read(b)
		if err != nil || !strings.HasPrefix(string(b[:n]), "HTTP/1.1 400 ") || !strings.Contains(string(b[:n]), want) {
			t.Errorf("tap%s is answered with %q, %v; want 400 and %q", query, b[:n], err, want)
		}
	}
	// The client has the reason, every time.
	c := NewClient(socket)
	for range 200 {
		_, _, err := c.Tap(t.Context(), TapQuery{Rule: "cam1", Options: tap.Everything}, io.Discard)
		var refused *Error
		if !errors.As(err, &refused) || refused.Kind != KindInvalid {
			t.Fatalf("refused with %v", err)
		}
	}
}
