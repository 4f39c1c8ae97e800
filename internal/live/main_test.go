package live

import (
	"testing"

	"xdpcast/internal/labtest"
)

func TestMain(m *testing.M) { labtest.Main(m) }
