//! Every field of both generations, found by letting serde read the types themselves, with a bad value each. A field that is
//! added to a type is in these tests without anybody's doing.

use std::collections::BTreeSet;

use serde::de::value::{Error, StrDeserializer};
use serde::de::{DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Value, json};

use super::backend::{Http, HttpProxy, LocalDisk, LocalFs, Oss, Registry, S3};
use super::shown::{HOLDERS, SECRET};
use super::{Config, FileCache, FsCache, v1};

/// What a field takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Text,
    Flag,
    /// Up to this.
    Number(u64),
    List,
    Object,
    /// Free in itself.
    Any,
    Secret,
    Url,
}

/// Gives every field some value and notes what it asked for.
struct Tracer<'a> {
    path: String,
    found: &'a mut BTreeSet<(String, Kind)>,
}

impl Tracer<'_> {
    fn note(&mut self, kind: Kind) {
        self.found.insert((self.path.clone(), kind));
    }

    fn below(&mut self, name: &str) -> Tracer<'_> {
        let dot = if self.path.is_empty() || name.starts_with('[') {
            ""
        } else {
            "."
        };
        Tracer {
            path: format!("{}{dot}{name}", self.path),
            found: self.found,
        }
    }
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Any);
        visitor.visit_unit()
    }
    fn deserialize_bool<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Flag);
        visitor.visit_bool(false)
    }
    fn deserialize_u8<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Number(u8::MAX.into()));
        visitor.visit_u8(0)
    }
    fn deserialize_u32<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Number(u32::MAX.into()));
        visitor.visit_u32(0)
    }
    fn deserialize_u64<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Number(u64::MAX));
        visitor.visit_u64(0)
    }
    fn deserialize_string<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Text);
        visitor.visit_str("")
    }
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note(match name {
            "Secret" => Kind::Secret,
            "SecretUrl" => Kind::Url,
            other => panic!("{}: a newtype {other}", self.path),
        });
        visitor.visit_newtype_struct(StrDeserializer::new(""))
    }
    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::List);
        visitor.visit_seq(One(Some(self.below("[0]"))))
    }
    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        self.note(Kind::Object);
        visitor.visit_map(Members {
            names: ["X-Any"].iter(),
            present: "",
            of: self,
        })
    }
    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.note(Kind::Object);
        visitor.visit_map(Members {
            names: fields.iter(),
            present: "",
            of: self,
        })
    }
    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        panic!("{}: an identifier", self.path)
    }
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }
    // What no field is made of yet. Whoever adds one sees it here.
    forward_to_deserialize_any! {
        i8 i16 i32 i64 u16 f32 f64 char str bytes byte_buf unit unit_struct tuple tuple_struct enum
    }
}

struct One<'a>(Option<Tracer<'a>>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Error;
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.take().map(|tracer| seed.deserialize(tracer)).transpose()
    }
}

struct Members<'a> {
    names: std::slice::Iter<'a, &'static str>,
    present: &'static str,
    of: Tracer<'a>,
}

impl<'de> MapAccess<'de> for Members<'_> {
    type Error = Error;
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some(name) = self.names.next() else {
            return Ok(None);
        };
        self.present = name;
        seed.deserialize((*name).into_deserializer()).map(Some)
    }
    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(self.of.below(self.present))
    }
}

type Fields = BTreeSet<(String, Kind)>;

/// The fields of `T` at `at`, without `at` itself.
fn of<'de, T: Deserialize<'de>>(at: &str) -> Fields {
    let mut found = Fields::new();
    let tracer = Tracer {
        path: at.to_owned(),
        found: &mut found,
    };
    T::deserialize(tracer).unwrap_or_else(|error| panic!("{at}: {error}"));
    found.retain(|(path, _)| path != at);
    found
}

/// Fields of a source, with those of its client.
fn source<'de, T: Deserialize<'de>>(at: &str, http: bool) -> Fields {
    let mut fields = of::<T>(at);
    if http {
        fields.extend(of::<Http>(at));
    }
    fields
}

/// A type of source, its smallest settings, and its fields wherever they stand.
type Source = (&'static str, Value, fn(&str) -> Fields);

fn sources() -> [Source; 6] {
    [
        ("localfs", json!({"dir": "/d"}), |at| source::<LocalFs>(at, false)),
        ("localdisk", json!({"device_path": "/d"}), |at| {
            source::<LocalDisk>(at, false)
        }),
        ("oss", json!({"endpoint": "e", "bucket_name": "b"}), |at| {
            source::<Oss>(at, true)
        }),
        (
            "s3",
            json!({"endpoint": "e", "region": "r", "bucket_name": "b"}),
            |at| source::<S3>(at, true),
        ),
        ("registry", json!({"host": "h", "repo": "r"}), |at| {
            source::<Registry>(at, true)
        }),
        ("http-proxy", json!({"addr": "http://h"}), |at| {
            source::<HttpProxy>(at, true)
        }),
    ]
}

/// A good document, and fields of it.
fn documents() -> Vec<(Value, Fields)> {
    let mut all = Vec::new();
    let cache = json!({"type": "filecache", "filecache": {}});
    let second = json!({"version": 2, "cache": cache});
    let mut fields = of::<super::Document>("");
    // Read by its type, below.
    fields.retain(|(path, _)| !path.starts_with("backend."));
    all.push((second, fields));
    let first = |source: &str, settings: &Value, cache: &str| {
        json!({"mode": "direct", "device": {"backend": {"type": source, "config": settings},
            "cache": {"type": cache, "config": {}}}})
    };
    let base = first("localfs", &json!({"dir": "/d"}), "blobcache");
    all.push((base.clone(), of::<v1::Document>("")));
    all.push((base, of::<FileCache>("device.cache.config")));
    all.push((
        first("localfs", &json!({"dir": "/d"}), "fscache"),
        of::<FsCache>("device.cache.config"),
    ));
    for (kind, settings, fields) in sources() {
        all.push((
            json!({"version": 2, "backend": {"type": kind, kind: settings}}),
            fields(&format!("backend.{kind}")),
        ));
        if kind != "http-proxy" {
            all.push((
                first(kind, &settings, "blobcache"),
                fields("device.backend.config"),
            ));
        }
    }
    all
}

/// Puts `value` at `path`, with all that leads there.
fn put(document: &mut Value, path: &str, value: Value) {
    let mut at = document;
    for name in path.split(['.', '[']) {
        at = match name.strip_suffix(']') {
            Some(_) => {
                *at = json!([null]);
                &mut at[0]
            }
            None => &mut at[name],
        };
    }
    *at = value;
}

/// What leads to a field must be good in itself.
fn complete(document: &mut Value, path: &str) {
    if path.contains(".prefetch.") {
        let prefetch = path.split(".prefetch.").next().unwrap();
        put(document, &format!("{prefetch}.prefetch"), json!({"enable": true}));
    }
}

/// Bad values of a field of this kind, and what is said of them.
fn bad(path: &str, kind: Kind) -> Vec<(Value, String, String)> {
    let name = path.rsplit(['.']).next().unwrap().split('[').next().unwrap();
    let secret = path.split(['.', '[']).any(|name| SECRET.contains(&name)) && !path.ends_with("].type");
    let shown = |text: &str| {
        if secret {
            "<hidden>".to_owned()
        } else {
            text.to_owned()
        }
    };
    let holder = |text: &str| {
        if HOLDERS.contains(&name) {
            "<hidden>".to_owned()
        } else {
            shown(text)
        }
    };
    let wrong = || json!("wr\u{9b}ong");
    let quoted = "\"wr\\u{9b}ong\"";
    match kind {
        Kind::Text | Kind::Url => vec![(json!(4711), shown("4711"), "a text".into())],
        Kind::Secret => vec![(json!(4711), "<hidden>".into(), "a text".into())],
        Kind::Flag => vec![(wrong(), shown(quoted), "true or false".into())],
        Kind::List => vec![(wrong(), holder(quoted), "a list".into())],
        Kind::Object => vec![(wrong(), holder(quoted), "an object".into())],
        Kind::Number(largest) => {
            let allowed = format!("a whole number from 0 to {largest}");
            let beyond = match largest.checked_add(1) {
                Some(beyond) => json!(beyond),
                None => json!(1e20),
            };
            [wrong(), json!(-1), json!(1.5), beyond.clone()]
                .into_iter()
                .map(|value| {
                    let text = if value == wrong() {
                        quoted.to_owned()
                    } else {
                        value.to_string()
                    };
                    (value, text, allowed.clone())
                })
                .collect()
        }
        Kind::Any => Vec::new(),
    }
}

#[test]
fn a_bad_value_of_every_field_is_refused_by_name_with_the_value_and_what_is_allowed() {
    let mut tried = BTreeSet::new();
    let mut free = BTreeSet::new();
    for (document, fields) in documents() {
        Config::parse(&document.to_string()).unwrap_or_else(|error| panic!("{document}: {error}"));
        for (path, kind) in fields {
            for (value, shown, allowed) in bad(&path, kind) {
                let mut document = document.clone();
                complete(&mut document, &path);
                put(&mut document, &path, value);
                let Err(error) = Config::parse(&document.to_string()) else {
                    panic!("{path}: taken: {document}");
                };
                let expected = format!(
                    "failed to parse configuration information: {path} is {shown}, allowed is {allowed}"
                );
                // Some are refused later, with a narrower range.
                let narrower = format!("invalid configuration: {path} is {shown}, allowed is ");
                let error = error.to_string();
                assert!(
                    error == expected || error.starts_with(&narrower),
                    "{error}\n{expected}"
                );
                tried.insert(path.clone());
            }
            if kind == Kind::Any {
                free.insert(path);
            }
        }
    }
    println!("{} fields: {tried:#?}", tried.len());
    // Values without a type of their own: settings whose fields are here under their own names, and those of a source that
    // is not ours.
    let expected = [
        "device.backend.config",
        "device.cache.config",
        "device.external_backends[0].config.X-Any",
        "device.external_backends[0].patch.X-Any",
        "external_backends[0].config.X-Any",
        "external_backends[0].patch.X-Any",
    ];
    assert_eq!(free.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    assert!(tried.len() > 170, "{}", tried.len());
}

#[test]
fn every_secret_is_known_to_the_errors_by_its_name() {
    for (_, fields) in documents() {
        for (path, _) in fields.iter().filter(|(_, kind)| *kind == Kind::Secret) {
            let known = path.split(['.', '[']).any(|name| SECRET.contains(&name));
            assert!(known, "{path}");
            // And what they stand in is never shown when it is a text.
            let mut names: Vec<&str> = path.split('.').collect();
            names.pop();
            for name in names.into_iter().map(|name| name.split('[').next().unwrap()) {
                let known = HOLDERS.contains(&name) || SECRET.contains(&name);
                assert!(known, "{path}: {name}");
            }
        }
    }
}
