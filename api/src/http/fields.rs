//! A JSON object whose repeated names are reported.
//!
//! JSON leaves it open which of two values of one name counts (RFC 8259, section 4), and `serde_json` takes the last. Whoever checks a body
//! before this service may take the first, and so would check another message than the one that is signed.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

/// The fields of a JSON object.
pub(super) struct Fields {
    /// The first value of each name.
    pub(super) values: Map<String, Value>,
    /// Names that are there more than once.
    pub(super) repeated: Vec<String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Fields, A::Error> {
                let mut fields = Fields { values: Map::new(), repeated: Vec::new() };
                while let Some((name, value)) = object.next_entry::<String, Value>()? {
                    if fields.values.contains_key(&name) {
                        fields.repeated.push(name);
                    } else {
                        fields.values.insert(name, value);
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}
