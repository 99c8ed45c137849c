/* X(code, name): every opcode of protocols 0 to 5 (CPython Lib/pickletools.py), so that a refusal can
 * name what it refuses. */
#ifndef IC_MODEL_PICKLE_OPS_H
#define IC_MODEL_PICKLE_OPS_H

#define IC_PICKLE_OPS(X)                                                                                   \
    X(0x28, MARK)                                                                                          \
    X(0x29, EMPTY_TUPLE)                                                                                   \
    X(0x2E, STOP)                                                                                          \
    X(0x30, POP)                                                                                           \
    X(0x31, POP_MARK)                                                                                      \
    X(0x32, DUP)                                                                                           \
    X(0x42, BINBYTES)                                                                                      \
    X(0x43, SHORT_BINBYTES)                                                                                \
    X(0x46, FLOAT)                                                                                         \
    X(0x47, BINFLOAT)                                                                                      \
    X(0x49, INT)                                                                                           \
    X(0x4A, BININT)                                                                                        \
    X(0x4B, BININT1)                                                                                       \
    X(0x4C, LONG)                                                                                          \
    X(0x4D, BININT2)                                                                                       \
    X(0x4E, NONE)                                                                                          \
    X(0x50, PERSID)                                                                                        \
    X(0x51, BINPERSID)                                                                                     \
    X(0x52, REDUCE)                                                                                        \
    X(0x53, STRING)                                                                                        \
    X(0x54, BINSTRING)                                                                                     \
    X(0x55, SHORT_BINSTRING)                                                                               \
    X(0x56, UNICODE)                                                                                       \
    X(0x58, BINUNICODE)                                                                                    \
    X(0x5D, EMPTY_LIST)                                                                                    \
    X(0x61, APPEND)                                                                                        \
    X(0x62, BUILD)                                                                                         \
    X(0x63, GLOBAL)                                                                                        \
    X(0x64, DICT)                                                                                          \
    X(0x65, APPENDS)                                                                                       \
    X(0x67, GET)                                                                                           \
    X(0x68, BINGET)                                                                                        \
    X(0x69, INST)                                                                                          \
    X(0x6A, LONG_BINGET)                                                                                   \
    X(0x6C, LIST)                                                                                          \
    X(0x6F, OBJ)                                                                                           \
    X(0x70, PUT)                                                                                           \
    X(0x71, BINPUT)                                                                                        \
    X(0x72, LONG_BINPUT)                                                                                   \
    X(0x73, SETITEM)                                                                                       \
    X(0x74, TUPLE)                                                                                         \
    X(0x75, SETITEMS)                                                                                      \
    X(0x7D, EMPTY_DICT)                                                                                    \
    X(0x80, PROTO)                                                                                         \
    X(0x81, NEWOBJ)                                                                                        \
    X(0x82, EXT1)                                                                                          \
    X(0x83, EXT2)                                                                                          \
    X(0x84, EXT4)                                                                                          \
    X(0x85, TUPLE1)                                                                                        \
    X(0x86, TUPLE2)                                                                                        \
    X(0x87, TUPLE3)                                                                                        \
    X(0x88, NEWTRUE)                                                                                       \
    X(0x89, NEWFALSE)                                                                                      \
    X(0x8A, LONG1)                                                                                         \
    X(0x8B, LONG4)                                                                                         \
    X(0x8C, SHORT_BINUNICODE)                                                                              \
    X(0x8D, BINUNICODE8)                                                                                   \
    X(0x8E, BINBYTES8)                                                                                     \
    X(0x8F, EMPTY_SET)                                                                                     \
    X(0x90, ADDITEMS)                                                                                      \
    X(0x91, FROZENSET)                                                                                     \
    X(0x92, NEWOBJ_EX)                                                                                     \
    X(0x93, STACK_GLOBAL)                                                                                  \
    X(0x94, MEMOIZE)                                                                                       \
    X(0x95, FRAME)                                                                                         \
    X(0x96, BYTEARRAY8)                                                                                    \
    X(0x97, NEXT_BUFFER)                                                                                   \
    X(0x98, READONLY_BUFFER)

#endif
