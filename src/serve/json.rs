//! Requests and responses as JSON, which binary tensors may follow.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bireme_base::message::quoted;
use bireme_protocol::{DataType, Encoding, Parameter, Tensor};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::error::Category;
use serde_path_to_error::Segment;

use crate::model::ServedModel;
use crate::request::{self, InferRequest};
use crate::request_error::RequestError;

/// The HTTP header with the length of the JSON that binary tensors follow.
pub const HEADER_LENGTH: &str = "inference-header-content-length";

#[derive(Debug)]
pub struct ParsedRequest {
    pub request: InferRequest,
    /// The client's name for the request.
    pub id: Option<String>,
    pub timeout: Option<Duration>,
    /// Whether an output is wanted in binary, where the request says; `all_binary` holds for the
    /// others.
    binary: BTreeMap<String, bool>,
    all_binary: bool,
}

// Required fields are optional here, so that their absence gets a message of our own.

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(default, borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
    #[serde(default, borrow)]
    inputs: Option<Vec<JsonInput<'a>>>,
    #[serde(default)]
    outputs: Vec<JsonOutput>,
}

#[derive(Deserialize)]
struct JsonInput<'a> {
    name: Option<String>,
    datatype: Option<String>,
    shape: Option<Vec<i64>>,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
    #[serde(default, borrow)]
    data: Option<ParsedElements<'a>>,
}

#[derive(Deserialize)]
struct JsonOutput {
    name: Option<String>,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
}

#[derive(Clone, Debug)]
enum Scalar {
    Parameter(Parameter),
    /// A value that no parameter may have: null, a list, an object.
    Other(&'static str),
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde_json::Value;
        Ok(match Value::deserialize(deserializer)? {
            Value::Bool(value) => Self::Parameter(Parameter::Bool(value)),
            Value::String(value) => Self::Parameter(Parameter::Text(value)),
            Value::Number(number) => Self::Parameter(match number.as_i64() {
                Some(value) => Parameter::Int(value),
                // An integer beyond 64 bits becomes a float, as in Triton.
                None => Parameter::Float(number.as_f64().unwrap_or(f64::INFINITY)),
            }),
            Value::Null => Self::Other("null"),
            Value::Array(_) => Self::Other("a list"),
            Value::Object(_) => Self::Other("an object"),
        })
    }
}

fn flag(parameters: &BTreeMap<String, Scalar>, name: &str) -> Result<Option<bool>, RequestError> {
    let given = match parameters.get(name) {
        None => return Ok(None),
        Some(Scalar::Parameter(Parameter::Bool(value))) => return Ok(Some(*value)),
        Some(Scalar::Parameter(other)) => other.to_string(),
        Some(Scalar::Other(kind)) => (*kind).to_owned(),
    };
    Err(RequestError::invalid(format!("parameter `{name}` must be true or false, not {given}")))
}

/// A message for JSON that cannot be read, with the place.
fn unreadable(json: &[u8], error: &serde_json::Error) -> RequestError {
    let place = format!("line {}, column {}", error.line(), error.column());
    match error.classify() {
        Category::Data => {}
        Category::Eof => {
            return RequestError::invalid(format!(
                "the body is not JSON: it ends early, at {place}"
            ));
        }
        _ if error.to_string().starts_with("recursion limit") => {
            return RequestError::invalid(format!(
                "the body is not a request: it is nested too deeply, at {place}"
            ));
        }
        _ => return RequestError::invalid(format!("the body is not JSON, at {place}")),
    }
    // Parse once more to find the path to the place, which is slower.
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let Err(found) = serde_path_to_error::deserialize::<_, Body<'_>>(&mut deserializer) else {
        return RequestError::invalid(format!("the body is not a request, at {place}"));
    };
    let path = found.path().to_string();
    if found.inner().to_string().starts_with("duplicate field") {
        return RequestError::invalid(format!(
            "the body is not a request: a key is given twice{}, at {place}",
            if path == "." { String::new() } else { format!(" in {}", quoted(&path)) }
        ));
    }
    let last = found.path().iter().rev().find_map(|segment| match segment {
        Segment::Map { key } => Some(key.as_str()),
        _ => None,
    });
    let is_element = matches!(found.path().iter().next_back(), Some(Segment::Seq { .. }));
    let wanted = match (last, is_element) {
        (Some("id" | "name" | "datatype"), _) => "a text",
        (Some("shape"), false) => "a list of whole numbers",
        (Some("shape"), true) => "a whole number below 2^63",
        (Some("inputs" | "outputs"), false) => "a list of objects",
        (Some("data"), _) => "a list of numbers, of true and false, or of texts",
        (Some(_), _) => "an object",
        (None, _) => "an object with `inputs`",
    };
    match last {
        None => RequestError::invalid(format!("the body must be {wanted}, at {place}")),
        Some(_) => RequestError::invalid(format!("{} must be {wanted}, at {place}", quoted(&path))),
    }
}

/// A tensor's elements, flattened from lists of any depth.
#[derive(Debug, Default)]
struct ParsedElements<'a>(Vec<ParsedElement<'a>>);

#[derive(Debug)]
enum ParsedElement<'a> {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(Cow<'a, str>),
}

impl ParsedElement<'_> {
    fn integer(&self) -> Option<i128> {
        match *self {
            Self::Int(value) => Some(value.into()),
            Self::Uint(value) => Some(value.into()),
            _ => None,
        }
    }

    fn number(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Int(value) => Some(value as f64),
            Self::Uint(value) => Some(value as f64),
            _ => None,
        }
    }
}

impl fmt::Display for ParsedElement<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Uint(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(text) => write!(f, "the text {}", quoted(text)),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for ParsedElements<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut cells = Vec::new();
        deserializer.deserialize_any(Flatten(&mut cells))?;
        Ok(Self(cells))
    }
}

/// Collects the elements of nested lists in one list.
struct Flatten<'c, 'de>(&'c mut Vec<ParsedElement<'de>>);

impl<'de> de::DeserializeSeed<'de> for Flatten<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flatten<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("numbers, truth values, texts or lists of them")
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.0.push(ParsedElement::Bool(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.0.push(ParsedElement::Int(value));
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.0.push(i64::try_from(value).map_or(ParsedElement::Uint(value), ParsedElement::Int));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.0.push(ParsedElement::Float(value));
        Ok(())
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<(), E> {
        self.0.push(ParsedElement::Text(Cow::Borrowed(value)));
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.0.push(ParsedElement::Text(Cow::Owned(value.to_owned())));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Flatten(self.0))?.is_some() {}
        Ok(())
    }
}

impl ParsedElements<'_> {
    /// The elements in the encoding of `datatype`.
    fn into_data(self, name: &str, datatype: DataType) -> Result<Vec<u8>, RequestError> {
        let mut data = Vec::with_capacity(self.0.len() * datatype.size().unwrap_or(8));
        for (number, cell) in self.0.into_iter().enumerate() {
            push(&mut data, datatype, &cell).ok_or_else(|| {
                let name = quoted(name);
                RequestError::invalid(format!(
                    "input {name}, element {number}: {cell} does not fit {datatype}"
                ))
            })?;
        }
        Ok(data)
    }
}

/// Appends the bytes of an element; `None` if `datatype` cannot hold it.
fn push(data: &mut Vec<u8>, datatype: DataType, cell: &ParsedElement<'_>) -> Option<()> {
    match (datatype.encoding(), cell) {
        (Encoding::Bool, ParsedElement::Bool(value)) => data.push((*value).into()),
        (Encoding::Bool, ParsedElement::Int(value @ (0 | 1))) => data.push(*value as u8),
        (Encoding::Signed | Encoding::Unsigned, _) => {
            datatype.push_integer(cell.integer()?, data)?;
        }
        (Encoding::Float, _) => match datatype.size() {
            Some(4) => data.extend((cell.number()? as f32).to_le_bytes()),
            Some(8) => data.extend(cell.number()?.to_le_bytes()),
            // JSON has no numbers of 16 bits: such tensors must be sent in binary.
            _ => return None,
        },
        (Encoding::Text, ParsedElement::Text(text)) => {
            data.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
            data.extend(text.as_bytes());
        }
        _ => return None,
    }
    Some(())
}

/// Reads a request: JSON of `header_length` bytes (`None`: the whole body), then binary tensors.
///
/// # Errors
/// The first thing wrong with the request, and its place.
pub fn read(body: &[u8], header_length: Option<&str>) -> Result<ParsedRequest, RequestError> {
    let length = match header_length {
        None => body.len(),
        Some(text) => {
            text.parse().ok().filter(|&length| length <= body.len()).ok_or_else(|| {
                RequestError::invalid(format!(
                    "`{HEADER_LENGTH}` is {}, and the body has {} bytes",
                    quoted(text),
                    body.len()
                ))
            })?
        }
    };
    let (json, mut binary) = body.split_at(length);
    // serde would accept a list of the fields' values in place of an object.
    if json.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err(RequestError::invalid("the body must be an object with `inputs`, not a list"));
    }
    let parsed: Body<'_> =
        serde_json::from_slice(json).map_err(|error| unreadable(json, &error))?;
    let lacks = |what: &str| RequestError::invalid(format!("the request lacks {what}"));
    let given = parsed.inputs.ok_or_else(|| lacks("`inputs`"))?;
    let mut inputs = Vec::with_capacity(given.len());
    for (number, JsonInput { name, datatype, shape, parameters, data }) in
        given.into_iter().enumerate()
    {
        let name = name.ok_or_else(|| lacks(&format!("`inputs[{number}].name`")))?;
        let of_input = |key: &str| lacks(&format!("the `{key}` of input {}", quoted(&name)));
        let datatype = datatype.ok_or_else(|| of_input("datatype"))?;
        let shape = shape.ok_or_else(|| of_input("shape"))?;
        let datatype =
            DataType::parse(&datatype).ok_or_else(|| request::unknown_type(&name, &datatype))?;
        let data = match (parameters.get("binary_data_size"), data) {
            (Some(size), None) => {
                let size = match size {
                    Scalar::Parameter(Parameter::Int(size)) => usize::try_from(*size).ok(),
                    _ => None,
                };
                let size = size.ok_or_else(|| {
                    let name = quoted(&name);
                    RequestError::invalid(format!(
                        "`binary_data_size` of input {name} must be a number of bytes"
                    ))
                })?;
                let (own, rest) = binary.split_at_checked(size).ok_or_else(|| {
                    let (name, n) = (quoted(&name), binary.len());
                    RequestError::invalid(format!(
                        "`binary_data_size` of input {name} is {size}, and {n} bytes are left of \
                         the body"
                    ))
                })?;
                binary = rest;
                own.to_vec()
            }
            (None, Some(cells)) => cells.into_data(&name, datatype)?,
            (given, _) => {
                let both = if given.is_some() { "not both" } else { "and has neither" };
                return Err(RequestError::invalid(format!(
                    "input {} must have `data` or `binary_data_size`, {both}",
                    quoted(&name)
                )));
            }
        };
        inputs.push(Tensor { name, datatype, shape, data });
    }
    if !binary.is_empty() {
        return Err(RequestError::invalid(format!("{} bytes follow the last input", binary.len())));
    }
    let all_binary = flag(&parsed.parameters, "binary_data_output")?.unwrap_or(false);
    let (mut timeout, mut parameters) = (None, Vec::new());
    for (name, value) in parsed.parameters {
        let value = match value {
            Scalar::Parameter(value) => value,
            Scalar::Other(kind) => {
                let name = quoted(&name);
                return Err(RequestError::invalid(format!(
                    "parameter {name} must be true, false, a number or a text, not {kind}"
                )));
            }
        };
        match name.as_str() {
            "binary_data_output" => {}
            // Over gRPC a negative timeout means no limit, as in Triton.
            request::TIMEOUT if matches!(value, Parameter::Int(..0)) => {
                return Err(RequestError::invalid(format!(
                    "parameter `timeout` is {value}: it is negative"
                )));
            }
            request::TIMEOUT => timeout = request::timeout(&value)?,
            _ => {
                request::check_parameter(&name)?;
                parameters.push((name, value));
            }
        }
    }
    let mut wanted_binary = BTreeMap::new();
    let mut outputs = Vec::new();
    for (number, JsonOutput { name, parameters }) in parsed.outputs.into_iter().enumerate() {
        let name = name.ok_or_else(|| lacks(&format!("`outputs[{number}].name`")))?;
        if parameters.contains_key("classification") {
            return Err(request::no_classes(&name));
        }
        if let Some(is_binary) = flag(&parameters, "binary_data")? {
            wanted_binary.insert(name.clone(), is_binary);
        }
        outputs.push(name);
    }
    Ok(ParsedRequest {
        request: InferRequest { inputs, outputs, parameters, max_answer: None },
        id: parsed.id.map(Cow::into_owned),
        timeout,
        binary: wanted_binary,
        all_binary,
    })
}

#[derive(Serialize)]
struct InferResponse<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    model_name: &'a str,
    model_version: String,
    outputs: Vec<InferResponseOutput<'a>>,
}

#[derive(Serialize)]
struct InferResponseOutput<'a> {
    name: &'a str,
    datatype: &'a str,
    shape: &'a [i64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Elements<'a>>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

/// A tensor's elements as one flat list.
struct Elements<'a>(&'a Tensor);

impl Serialize for Elements<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Tensor { datatype, data, .. } = self.0;
        let size = datatype.size().unwrap_or(1);
        match (datatype.encoding(), size) {
            (Encoding::Bool, _) => serializer.collect_seq(data.iter().map(|&byte| byte != 0)),
            (Encoding::Signed, _) => serializer.collect_seq(data.chunks_exact(size).map(|bytes| {
                let is_negative = bytes[size - 1] >= 0x80;
                i64::from_le_bytes(widened(bytes, if is_negative { 0xff } else { 0 }))
            })),
            (Encoding::Unsigned, _) => {
                let values = data.chunks_exact(size);
                serializer.collect_seq(values.map(|bytes| u64::from_le_bytes(widened(bytes, 0))))
            }
            (Encoding::Float, 4) => {
                let (values, _) = data.as_chunks();
                serializer.collect_seq(values.iter().map(|&bytes| f32::from_le_bytes(bytes)))
            }
            (Encoding::Float, 8) => {
                let (values, _) = data.as_chunks();
                serializer.collect_seq(values.iter().map(|&bytes| f64::from_le_bytes(bytes)))
            }
            (Encoding::Float, _) => {
                let problem = format!("{datatype} is only given in binary");
                Err(serde::ser::Error::custom(problem))
            }
            (Encoding::Text, _) => {
                let texts = self.0.view().texts().map_err(serde::ser::Error::custom)?;
                serializer.collect_seq(texts)
            }
        }
    }
}

/// The 8 bytes of an integer of fewer bytes, whose upper ones are `fill`.
fn widened(bytes: &[u8], fill: u8) -> [u8; 8] {
    let mut widened = [fill; 8];
    widened[..bytes.len()].copy_from_slice(bytes);
    widened
}

/// A response's body, and the length of its JSON if binary tensors follow.
#[derive(Debug)]
pub struct WrittenBody {
    pub body: Vec<u8>,
    pub header_length: Option<usize>,
}

impl ParsedRequest {
    /// Writes the response.
    ///
    /// # Errors
    /// An output of a type that JSON cannot hold.
    pub fn answer<'a>(
        &'a self,
        model: &'a ServedModel,
        outputs: &'a [Tensor],
    ) -> Result<WrittenBody, RequestError> {
        let is_binary =
            |tensor: &&Tensor| *self.binary.get(&tensor.name).unwrap_or(&self.all_binary);
        let output = |tensor: &'a Tensor| InferResponseOutput {
            name: tensor.name.as_str(),
            datatype: tensor.datatype.name(),
            shape: &tensor.shape,
            parameters: is_binary(&tensor)
                .then_some(BinarySize { binary_data_size: tensor.data.len() }),
            data: (!is_binary(&tensor)).then_some(Elements(tensor)),
        };
        let answer = InferResponse {
            id: self.id.as_deref(),
            model_name: &model.config.name,
            model_version: model.version.to_string(),
            outputs: outputs.iter().map(output).collect(),
        };
        let mut body = serde_json::to_vec(&answer).map_err(RequestError::invalid)?;
        let length = body.len();
        let mut binary = outputs.iter().filter(is_binary).peekable();
        let header_length = binary.peek().map(|_| length);
        binary.for_each(|tensor| body.extend(&tensor.data));
        Ok(WrittenBody { body, header_length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_in_lists_and_binary_tensors_are_read() {
        let json = br#"{"id":"7",
                      "parameters":{"exclude_seen":true,"timeout":1500,"binary_data_output":true},
            "inputs":[{"name":"a","datatype":"INT64","shape":[2,1],"data":[[1],[-2]]},
                      {"name":"b","datatype":"FP32","shape":[2],
                        "parameters":{"binary_data_size":8}},
                      {"name":"c","datatype":"BYTES","shape":[2],"data":["x","\u00e9\n"]}],
            "outputs":[{"name":"o","parameters":{"binary_data":false}}]}"#;
        let mut body = json.to_vec();
        body.extend([1.5f32, -0.5].into_iter().flat_map(f32::to_le_bytes));
        let asked = read(&body, Some(&json.len().to_string())).unwrap();
        let [a, b, c] = &asked.request.inputs[..] else { panic!("{asked:?}") };
        assert_eq!(*a, Tensor::ints("a", &[2, 1], [1, -2]));
        assert_eq!(*b, Tensor::floats("b", &[2], [1.5, -0.5]));
        assert_eq!(*c, Tensor::texts("c", &[2], ["x", "é\n"]));
        assert_eq!(asked.request.parameters, [("exclude_seen".to_owned(), Parameter::Bool(true))]);
        assert_eq!(asked.timeout, Some(Duration::from_micros(1500)));
        assert_eq!(
            (asked.id.as_deref(), asked.all_binary, asked.binary["o"]),
            (Some("7"), true, false)
        );
    }

    #[test]
    fn numbers_survive_json() {
        for (datatype, json) in [
            ("BOOL", "[true,false]"),
            ("INT8", "[-128,127]"),
            ("INT16", "[-32768,32767]"),
            ("INT32", "[-1,2147483647]"),
            ("INT64", "[-9223372036854775808,9223372036854775807]"),
            ("UINT8", "[0,255]"),
            ("UINT16", "[1,65535]"),
            ("UINT32", "[1,4294967295]"),
            ("UINT64", "[1,18446744073709551615]"),
            ("FP32", "[0.1,-3.4028235e+38]"),
            ("FP64", "[0.1,5e-324]"),
            ("BYTES", r#"["","é"]"#),
        ] {
            let datatype = DataType::parse(datatype).unwrap();
            let cells: ParsedElements<'_> = serde_json::from_str(json).unwrap();
            let data = cells.into_data("x", datatype).unwrap();
            let tensor = Tensor { name: "x".into(), datatype, shape: vec![2], data };
            assert_eq!(serde_json::to_string(&Elements(&tensor)).unwrap(), json);
        }
        let half = Tensor { datatype: DataType::Bf16, ..Tensor::ints("x", &[0], []) };
        assert!(serde_json::to_string(&Elements(&half)).unwrap_err().to_string().contains("BF16"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let input = |rest: &str| format!(r#"{{"inputs":[{{"name":"a","shape":[1],{rest}}}]}}"#);
        for (body, message) in [
            (String::new(), "the body is not JSON: it ends early, at line 1, column 0"),
            ("{inputs}".to_owned(), "the body is not JSON, at line 1, column 2"),
            ("[]".to_owned(), "the body must be an object with `inputs`, not a list"),
            ("7".to_owned(), "the body must be an object with `inputs`, at line 1, column 1"),
            ("{}".to_owned(), "the request lacks `inputs`"),
            (r#"{"inputs":7}"#.to_owned(), "`inputs` must be a list of objects, at line 1"),
            (r#"{"inputs":[7]}"#.to_owned(), "`inputs[0]` must be an object, at line 1"),
            (r#"{"inputs":[],"inputs":[]}"#.to_owned(), "a key is given twice"),
            (r#"{"inputs":[{"name":"a"}]}"#.to_owned(), "lacks the `datatype` of input `a`"),
            (r#"{"inputs":[{"name":["a"]}]}"#.to_owned(), "`inputs[0].name` must be a text"),
            (
                r#"{"inputs":[{"shape":[1,2.5]}]}"#.to_owned(),
                "`inputs[0].shape[1]` must be a whole number",
            ),
            (r#"{"inputs":[],"id":7}"#.to_owned(), "`id` must be a text"),
            (r#"{"inputs":[],"parameters":[]}"#.to_owned(), "`parameters` must be an object"),
            (
                r#"{"inputs":[],"parameters":{"x":null}}"#.to_owned(),
                "parameter `x` must be true, false, a number",
            ),
            (
                r#"{"inputs":[],"parameters":{"timeout":"1s"}}"#.to_owned(),
                "microseconds, not the text `1s`",
            ),
            (
                r#"{"inputs":[],"parameters":{"timeout":-1}}"#.to_owned(),
                "`timeout` is -1: it is negative",
            ),
            (
                r#"{"inputs":[],"parameters":{"triton_x":1}}"#.to_owned(),
                "`triton_x`: names that begin with",
            ),
            (
                r#"{"inputs":[],"parameters":{"binary_data_output":"no"}}"#.to_owned(),
                "`binary_data_output` must be true or false, not the text `no`",
            ),
            (input(r#""datatype":"INT9","data":[1]"#), "unknown type `INT9`; types are BOOL, "),
            (input(r#""datatype":"INT8","data":[300]"#), "element 0: 300 does not fit INT8"),
            (
                input(r#""datatype":"INT64","data":["x"]"#),
                "element 0: the text `x` does not fit INT64",
            ),
            (input(r#""datatype":"INT64","data":[1.0]"#), "element 0: 1.0 does not fit INT64"),
            (input(r#""datatype":"INT64","data":[null]"#), "`inputs[0].data"),
            (input(r#""datatype":"INT64","data":{"a":1}"#), "must be a list of numbers"),
            (
                input(r#""datatype":"INT64""#),
                "must have `data` or `binary_data_size`, and has neither",
            ),
            (
                input(r#""datatype":"INT64","parameters":{"binary_data_size":8}"#),
                "is 8, and 0 bytes are left",
            ),
            (
                input(r#""datatype":"INT64","parameters":{"binary_data_size":-8}"#),
                "must be a number of bytes",
            ),
            ("[".repeat(100_000), "the body must be an object"),
            (
                format!(
                    r#"{{"inputs":[{{"name":"a","datatype":"INT8","shape":[1],"data":{}"#,
                    "[".repeat(100_000)
                ),
                "nested too deeply",
            ),
        ] {
            let fault = read(body.as_bytes(), None).unwrap_err();
            assert!(fault.message.contains(message), "{body:.80}: {fault}");
        }
        for (microseconds, limit) in [(0, None), (7, Some(Duration::from_micros(7)))] {
            let body = format!(r#"{{"inputs":[],"parameters":{{"timeout":{microseconds}}}}}"#);
            assert_eq!(read(body.as_bytes(), None).unwrap().timeout, limit);
        }
        assert!(read(b"{}", Some("3")).unwrap_err().message.contains("has 2 bytes"));
        assert!(
            read(br#"{"inputs":[]}1234"#, Some("13"))
                .unwrap_err()
                .message
                .contains("4 bytes follow")
        );
    }
}
