/* JSON Schema → GBNF: the grammar text that keeps a model's output inside a schema.
 *
 * Promise: every complete output of the grammar is one JSON text valid under the schema (draft
 * 2020-12). A keyword is either enforced or refused by name; none is ignored. The reverse does not
 * hold everywhere, on purpose; what the grammar leaves out:
 *
 *  - Objects are closed unless told otherwise. JSON Schema's default for `additionalProperties` is
 *    true, but a grammar that follows it lets a model add keys without end, and no author of a
 *    schema with `properties` means that. So where no schema that applies to an object has
 *    `additionalProperties`, and one has `properties` or `required`, only those names may appear.
 *    An explicit true or schema is honoured: extra members follow the declared ones, and their names
 *    differ from all declared ones. `{"type":"object"}` alone means any object.
 *  - Likewise `prefixItems` without `items` ends the array there (or at `minItems`, if later).
 *  - Declared members come in declared order (of allOf and $ref first, then the schema's own, then
 *    anyOf's); optional ones may be absent.
 *  - Without `type`, `enum` and `const`, keywords of one kind choose it: `properties` means an
 *    object, `minLength` a string (JSON Schema lets other kinds pass such keywords).
 *  - Numbers have at most 18 digits before the point (more if a bound needs them) and 17 after, an
 *    exponent of at most two digits, and none at all where there is a bound; integers are spelled
 *    without point, exponent and "-0". Beside an exclusive bound other than 0 they begin with the next
 *    double, for readers to whom all between is the bound.
 *  - Constants and object names have one spelling, as do strings under `pattern` or `format`: no
 *    needless escapes. Free strings may use any escape but lone surrogates.
 *  - Blank space is bounded: a space, or a line break and up to 32 blanks, after '{', '[', ',' and
 *    before '}', ']'; a space after ':'. None before or after the text.
 *
 * Keywords: type, enum, const; properties, required, additionalProperties; items, prefixItems,
 * minItems, maxItems; minLength, maxLength, pattern, format (date, time, date-time, uuid, email,
 * ipv4); minimum, maximum, exclusiveMinimum, exclusiveMaximum; $ref within the document (also
 * recursive), $defs, definitions; allOf, anyOf, oneOf; true and false. Siblings combine as the
 * standard says: all of them hold. oneOf is accepted where its alternatives can be shown to exclude
 * each other (other types, other constants, a required member with other constants, a required
 * member that the other never writes), since then it is anyOf; else refused. Annotations ($schema,
 * $id at the root, $comment, title, description, default, examples, deprecated, readOnly, writeOnly)
 * are read over. uniqueItems may be false, propertyNames what every name fulfils (true, {},
 * {"type": "string"}). Everything else is refused by name: multipleOf, not, if/then/else,
 * patternProperties, other propertyNames, dependent*, contains, min/maxProperties, uniqueItems,
 * unevaluated*, $anchor, $dynamicRef, content*, unknown names, other formats.
 *
 * Patterns are ECMA-262 without lookaround, back references, \b, \B, \p and \c. They match anywhere
 * in the string unless anchored, are compiled to a deterministic automaton (so a pattern can never
 * make the grammar engine backtrack), and combine with length bounds and each other. */
#ifndef IC_TEXT_SCHEMA_H
#define IC_TEXT_SCHEMA_H

#include <jansson.h>

#include "base/buf.h"
#include "base/status.h"

/* Bounds; past one the answer is IC_TOO_LARGE and names it. */
#define IC_SCHEMA_DEPTH_MAX 64           /* nested schemas; chained $ref, allOf, anyOf: twice that */
#define IC_SCHEMA_NODES_MAX 4096         /* schemas in the document */
#define IC_SCHEMA_ENUM_MAX 2000          /* values of one enum */
#define IC_SCHEMA_MEMBERS_MAX 512        /* declared members of one object */
#define IC_SCHEMA_BRANCHES_MAX 128       /* anyOf/oneOf alternatives of one value, multiplied out */
#define IC_SCHEMA_REPEAT_MAX 65536       /* minItems, maxItems, minLength, maxLength */
#define IC_SCHEMA_PATTERN_MAX 1024       /* characters of a pattern; bounds of {m,n} up to 1000 */
#define IC_SCHEMA_STATES_MAX 2048        /* automaton states of one string */
#define IC_SCHEMA_RULES_MAX 16384        /* grammar rules */
#define IC_SCHEMA_ELEMENTS_MAX 400000    /* grammar elements once llama.cpp has unrolled {m,n} */
#define IC_SCHEMA_OUTPUT_MAX (256 << 10) /* bytes of grammar text */

/* Writes the grammar of `schema` (borrowed, not changed) to `out`, which is cleared first; its start
 * rule is `root`, and out->data[out->len] is NUL. On failure `out` is empty and `err` (may be NULL)
 * says which keyword, why, and where as a JSON pointer: IC_BAD_REQUEST (wrong type, unsupported, or
 * no value can satisfy the schema), IC_TOO_LARGE, IC_OOM. Pure and bounded: any thread; milliseconds
 * for usual schemas, a tenth of a second for the worst accepted, a quarter to refuse a hostile one. */
enum ic_status ic_schema_to_gbnf(const json_t *schema, struct ic_buf *out, struct ic_err *err);

#endif
