#include "textflag.h"

// func cpuid(leaf, sub uint32) (a, b, c, d uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, a+8(FP)
	MOVL BX, b+12(FP)
	MOVL CX, c+16(FP)
	MOVL DX, d+20(FP)
	RET

// func clwb(line unsafe.Pointer, lines int)
TEXT ·clwb(SB), NOSPLIT, $0-16
	MOVQ line+0(FP), AX
	MOVQ lines+8(FP), CX

next:
	CLWB (AX)
	ADDQ $64, AX
	DECQ CX
	JNZ  next
	RET

// func clflushopt(line unsafe.Pointer, lines int)
TEXT ·clflushopt(SB), NOSPLIT, $0-16
	MOVQ line+0(FP), AX
	MOVQ lines+8(FP), CX

next:
	CLFLUSHOPT (AX)
	ADDQ       $64, AX
	DECQ       CX
	JNZ        next
	RET

// func clflush(line unsafe.Pointer, lines int)
TEXT ·clflush(SB), NOSPLIT, $0-16
	MOVQ line+0(FP), AX
	MOVQ lines+8(FP), CX

next:
	CLFLUSH (AX)
	ADDQ    $64, AX
	DECQ    CX
	JNZ     next
	RET

// func storeNT(dst, src unsafe.Pointer, lines int)
TEXT ·storeNT(SB), NOSPLIT, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ lines+16(FP), CX

next:
	MOVOU (SI), X0
	MOVOU 16(SI), X1
	MOVOU 32(SI), X2
	MOVOU 48(SI), X3
	MOVNTO X0, (DI)
	MOVNTO X1, 16(DI)
	MOVNTO X2, 32(DI)
	MOVNTO X3, 48(DI)
	ADDQ  $64, SI
	ADDQ  $64, DI
	DECQ  CX
	JNZ   next
	RET

// func sfence()
TEXT ·sfence(SB), NOSPLIT, $0-0
	SFENCE
	RET
