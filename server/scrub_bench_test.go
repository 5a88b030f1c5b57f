package server

import (
	"context"
	"fmt"
	"testing"
	"time"

	"sealfs/disk"
	"sealfs/lsfs"
	"sealfs/op"
)

// BenchmarkScrub compares a scrub with reading the same bytes one after the
// other and doing nothing with them: both bypass the kernel's cache. ratio is
// the scrub's rate by the device's.
func BenchmarkScrub(b *testing.B) {
	for _, size := range []int{4 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("files=%dK", size>>10), func(b *testing.B) {
			s, root := fileServer(b, 4<<30)
			const total = 512 << 20
			ctx := context.Background()
			data := make([]byte, size)
			var rep op.Reply
			do := func(req op.Request) {
				req.Volume = 1
				rep.Reset()
				if err := s.Do(ctx, &req, &rep); err != nil || rep.Code != 0 {
					b.Fatal(err, rep.Code)
				}
			}
			for i := range total / size {
				data[i%size]++
				do(op.Request{Type: op.Create, Dir: root, Shard: root.Home(4096), Name: fmt.Sprintf("f%08d", i), Mode: 0o644})
				do(op.Request{Type: op.Write, Ino: rep.Attr.Ino, Shard: rep.Attr.Ino.Home(4096), Data: data})
			}
			st := s.stores[0]
			if err := st.Checkpoint(); err != nil {
				b.Fatal(err)
			}
			dev, err := disk.Open(st.opts.Device, disk.OpenOptions{ReadOnly: true, Direct: true})
			if err != nil {
				b.Fatal(err)
			}
			defer dev.Close()
			room := disk.AlignedBuffer(2 << 20)
			var scrub, raw time.Duration
			var bytes, rawBytes int64
			for b.Loop() {
				from := time.Now()
				for off := int64(1 << 20); off < total; off += int64(len(room)) {
					if _, err := dev.ReadAt(room, off); err != nil {
						b.Fatal(err)
					}
					rawBytes += int64(len(room))
				}
				raw += time.Since(from)
				rounds := st.Scrub(false).Rounds
				if err := st.StartScrub(lsfs.ScrubOptions{Restart: true}); err != nil {
					b.Fatal(err)
				}
				poll(b, "the scrub has ended", func() bool { return st.Scrub(false).Rounds > rounds })
				last := st.Scrub(true).Last
				if last.Damages != 0 || last.Claims < uint64(total/size)*9/10 {
					b.Fatalf("%+v", last)
				}
				scrub += last.Busy
				bytes += last.Bytes
			}
			rate, device := float64(bytes)/scrub.Seconds(), float64(rawBytes)/raw.Seconds()
			b.ReportMetric(rate/1e6, "scrub-MB/s")
			b.ReportMetric(device/1e6, "device-MB/s")
			b.ReportMetric(rate/device, "ratio")
		})
	}
}
