/// A library that is loaded into a program before it begins: what other people's wrappers and
/// security profiles do to it.
public struct Preload: Sendable {
    public let path: String
    private let folder: TempFolder

    public static let isUsable = hasProgram("clang")

    /// - Parameter source: in C.
    public init(_ source: String) throws {
        folder = try TempFolder()
        path = folder.path("preload.so")
        let file = try folder.write("preload.c", Array(source.utf8))
        try require("clang", ["-shared", "-fPIC", "-o", path, file, "-ldl"])
    }

    public var environment: [String: String] { ["LD_PRELOAD": path] }
}
