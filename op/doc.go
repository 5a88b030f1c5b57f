// Package op is the language in which SealFS says what is to be done: requests
// and replies as plain structs, and the one codec that turns them into bytes.
// The same encoding travels on the wire and stands as the logical operation in
// the records of a store's log, so that a record can be replayed by another
// replica word for word.
//
// A Request is a flat struct: each type uses the fields that its comment names
// and leaves the rest zero; zero fields cost nothing when encoded (a presence
// mask precedes them). What is not deterministic is resolved by the primary
// before the operation is applied, by filling in fields (Time, and the flags
// marked "resolved").
//
// # Encoding
//
//	size  field
//	   1  type
//	   4  presence mask, little-endian: bit i set = field i follows
//	   …  the present fields in order of their bits: unsigned varints, zigzag
//	      varints for times, length-prefixed bytes for names and data
//
// A field that is zero must be absent, varints must be in their shortest form
// and unknown types or bits are refused: a request has exactly one encoding.
// The payload of a Write is never part of the encoding: it travels beside it.
package op
