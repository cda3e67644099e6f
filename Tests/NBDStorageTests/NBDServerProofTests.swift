import DiskImage
import Testing

@testable import NBDStorage

@Suite struct NBDServerProofTests {
    /// CVE-2024-7383 names 1.18.5 and 1.20.2; earlier branches have no release with the fix.
    @Test(arguments: [
        ("1.14.2", false), ("1.18.4", false), ("1.18.5", true), ("1.19.9", false),
        ("1.20.1", false), ("1.20.2", true), ("1.22.0", true), ("2.0.0", true), ("", false),
    ])
    func knowsWhichLibraryVerifies(_ version: String, _ verifies: Bool) {
        #expect(NBDLibraryVersion(text: version).verifiesBySystem == verifies)
    }

    private func proof(_ name: ImageName, _ version: String) throws -> NBDServerProof {
        try NBDServerProof(
            try #require(try NBDAddress(name)), library: NBDLibraryVersion(text: version))
    }

    @Test func onlySecureExportsProveAnything() throws {
        for name: ImageName in ["nbd://host/?tls-certificates=/nonexistent", "nbd:host:10809"] {
            #expect(try !proof(name, "1.14.2").isWaived)
        }
    }

    /// The last value counts, with either separator, and %XX is decoded.
    @Test func parametersAreReadAsTheLibraryReadsThem() throws {
        #expect(
            try proof("nbds://host/x?tls-verify-peer=1;tls-verify-peer=%6Eo", "1.14.2").isWaived)
        #expect(throws: ImageError.self) {
            try proof("nbds://host/x?tls-verify-peer=0&tls-verify-peer=1", "1.14.2")
        }
    }

    /// Newer libraries use the system's authorities, and verify on unix sockets.
    @Test func newerLibrariesAreLeftAlone() throws {
        for name: ImageName in ["nbds://host/", "nbds+unix:///?socket=/x"] {
            let proof = try proof(name, "1.20.2")
            #expect(!proof.isWaived && proof.folder == nil)
        }
    }
}
